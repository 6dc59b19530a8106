"""The batches of a rank, step by step: the plan says which samples, workers read, encode and collate them, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_share4v.data.collate import Role, collate
from megatron_share4v.data.encode import Encoder
from megatron_share4v.data.index import Index
from megatron_share4v.data.plan import Plan
from megatron_share4v.data.sample import Batch
from megatron_share4v.data.store import SampleStore
from megatron_share4v.data.workers import ordered_map

__all__ = ["Role", "batches"]


def batches(
    index: Index,
    plan: Plan,
    encoder: Encoder,
    *,
    role: Role,
    start_step: int,
    stop_step: int,
    data_rank: int,
    data_size: int,
    num_workers: int,
    prefetch: int,
) -> Iterator[list[Batch]]:
    """For each step in [start_step, stop_step): this data-parallel rank's micro-batches, in the order in which they are run.

    The first stage gets tokens and pixels, the last labels (image bytes are not read), the middle batches without content.
    prefetch: micro-batches that each worker keeps ready. What is yielded depends neither on num_workers nor on where reading started.
    Raises ConfigError when the micro-batches of a step cannot be shared by data_size ranks, DataError (naming shard and key) for a sample
    that cannot be read, when its step is reached.
    """
    count = plan.micro_batches_per_rank(data_size=data_size)
    if not (role.first or role.last):
        nothing = Batch(token_ids=None, image_slots=None, pixels=None, target_rows=None, targets=None)
        for _ in range(start_step, stop_step):
            yield [nothing] * count
        return
    store = SampleStore(index)
    read = _Read(store=store, encoder=encoder, role=role, tokens_per_image=plan.tokens_per_image)
    requests = _requests(plan, start_step=start_step, stop_step=stop_step, data_rank=data_rank, data_size=data_size)
    stream = ordered_map(read, requests, num_workers=num_workers, prefetch=prefetch)
    try:
        for _ in range(start_step, stop_step):
            yield [next(stream) for _ in range(count)]
    finally:
        stream.close()
        store.close()


@dataclass(frozen=True)
class _Request:
    """One micro-batch: its samples' row numbers and the sequence length of its step."""

    rows: tuple[int, ...]
    sequence_length: int


@dataclass(frozen=True)
class _Read:
    """Request -> Batch; what a worker runs."""

    store: SampleStore
    encoder: Encoder
    role: Role
    tokens_per_image: int

    def __call__(self, request: _Request) -> Batch:
        samples = [self.store.read(row, with_image=self.role.first) for row in request.rows]
        examples = [self.encoder.encode(sample, with_pixels=self.role.first) for sample in samples]
        return collate(examples, sequence_length=request.sequence_length, tokens_per_image=self.tokens_per_image, role=self.role)


def _requests(plan: Plan, *, start_step: int, stop_step: int, data_rank: int, data_size: int) -> Iterator[_Request]:
    for step in range(start_step, stop_step):
        items = plan.step(step)
        for rows in plan.micro_batches(items, data_rank=data_rank, data_size=data_size):
            yield _Request(rows=tuple(rows.tolist()), sequence_length=items.sequence_length)

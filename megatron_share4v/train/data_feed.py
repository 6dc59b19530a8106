"""Data of each optimizer step: one complete micro-batch per rank, from what the loaders read and the ranks exchange.

Middle pipeline stages read nothing. On the first stage every rank of a sample group (TP and CP axes) decodes its share
of the images; TP rank 0 of the first and of the last stage reads the text. Each rank keeps the positions that are its
own (data/loading/context_parallel.py).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.loading.loader import (
    EMPTY_BATCH,
    ImageSharding,
    LoadedMicroBatch,
    Loader,
    LoaderOptions,
    StageRole,
)
from megatron_share4v.data.loading.prefetch import prefetch_to_device
from megatron_share4v.data.records import Batch
from megatron_share4v.data.sampling.blend import BlendedIndex
from megatron_share4v.data.sampling.sampler import GlobalBatch, MicroBatch, Sampler
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.quarantine import Fault
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.parallel.broadcast import broadcast_tensors
from megatron_share4v.parallel.collectives import gather_interleaved_rows

_TEXT = ("token_ids", "image_slots", "target_rows", "targets")  # every rank has the segments from the sampler


@dataclass(frozen=True)
class StepData:
    """Data of one optimizer step on this rank."""

    items: GlobalBatch
    batches: list[Batch]
    """Micro-batches of this rank; empty for a skipped step."""
    wait_s: float
    """Time that this rank waited for its data."""
    faulty_rows: frozenset[int] = frozenset()
    """Samples of the step that some rank could not read; equal on all ranks."""
    faults: tuple[Fault, ...] = field(default=())
    """Samples that this rank could not read, with reasons."""

    @property
    def step_index(self) -> int:
        """0-based index of the step in the sample order."""
        return self.items.step

    @property
    def step(self) -> int:
        """1-based number of the step, as in every log and file."""
        return self.step_index + 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """One prepared data set with its sampler and encoder."""

    index: Index | BlendedIndex
    sampler: Sampler
    encoder: Encoder
    options: LoaderOptions


def feed(
    source: Source, *, mesh: Mesh, after_step: int, last_step: int, skip_steps: Collection[int] = ()
) -> Generator[StepData]:
    """Yield the data of steps after_step + 1 to last_step on this rank's device. All ranks must iterate alike.

    The data of `skip_steps` is not read; they have no batches.
    """
    skip_indices = frozenset(step - 1 for step in skip_steps)
    loader = _open_loader(source, mesh)
    prefetched = loader.steps(after_step, last_step, skip=skip_indices) if loader else None
    reading = prefetch_to_device(prefetched, mesh.device) if prefetched is not None else None
    try:
        for step_index in range(after_step, last_step):
            items = source.sampler.global_batch(step_index)
            if step_index in skip_indices:
                yield StepData(items, [], 0.0)
                continue
            planned = source.sampler.micro_batches(items, data_rank=mesh.coordinates.data, data_size=mesh.layout.data)
            started = time.perf_counter()
            readings = next(reading) if reading is not None else None
            faults = tuple(fault for one in readings or [] for fault in one.faults)
            faulty = _share_faulty_rows(items, faults, mesh)
            batches = _assemble_batches(source, readings, planned, loader, faulty=faulty, mesh=mesh)
            yield StepData(items, batches, time.perf_counter() - started, faulty, faults)
    finally:
        if reading is not None:
            reading.close()


def _open_loader(source: Source, mesh: Mesh) -> Loader | None:
    """Open this rank's loader; None on ranks that read nothing."""
    role = StageRole(first=mesh.is_first_stage, last=mesh.is_last_stage and mesh.reads_data)
    if not (role.first or role.last):
        source.sampler.micro_batches_per_rank(data_size=mesh.layout.data)
        return None
    return Loader(
        source.index,
        source.sampler,
        source.encoder,
        role=role,
        data_rank=mesh.coordinates.data,
        data_size=mesh.layout.data,
        options=source.options,
        image_sharding=ImageSharding(mesh.tp_cp_group.rank(), mesh.tp_cp_group.size())
        if role.first
        else ImageSharding(),
    )


def _share_faulty_rows(items: GlobalBatch, faults: Sequence[Fault], mesh: Mesh) -> frozenset[int]:
    """Return the rows of the step that any rank could not read. Collective, at every step.

    An image fails on the first stage, where it is decoded; its labels must be masked on the last. The all-reduce has
    one byte per sample and runs with and without failures, so all ranks make the same collectives.
    """
    rows = [fault.row for fault in faults]
    flags = torch.from_numpy(np.isin(items.rows, rows).astype(np.uint8)).to(mesh.device.torch_device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return frozenset(items.rows[flags.cpu().numpy().astype(bool)].tolist())


def _assemble_batches(
    source: Source,
    readings: list[LoadedMicroBatch] | None,
    planned: Sequence[MicroBatch],
    loader: Loader | None,
    *,
    faulty: frozenset[int],
    mesh: Mesh,
) -> list[Batch]:
    """Assemble this rank's part of the micro-batches from what its sample group has read. Collective in the group."""
    local = [reading.batch for reading in readings or []]
    if faulty and loader is not None and local[0].targets is not None:
        affected = [faulty.intersection(micro_batch.rows) for micro_batch in planned]
        local = [
            loader.mask_samples(batch, micro_batch, rows=rows) if rows else batch
            for batch, micro_batch, rows in zip(local, planned, affected)
        ]
    whole = [EMPTY_BATCH] * len(planned)
    if mesh.is_first_stage or mesh.is_last_stage:
        whole = _share_text(local if mesh.reads_data else None, count=len(planned), mesh=mesh)
    if mesh.is_first_stage:
        counts = [source.index.rows["n_img"][list(micro_batch.rows)].sum() for micro_batch in planned]
        pixels = _share_pixels(local, counts, mesh=mesh)
        whole = [replace(batch, pixels=images) for batch, images in zip(whole, pixels)]
    rank, size = mesh.coordinates.context, mesh.layout.context
    return [
        slice_for_context_parallel(
            replace(batch, segments=micro_batch.segments),
            rank=rank,
            size=size,
            sequence_length=micro_batch.sequence_length,
        )
        for batch, micro_batch in zip(whole, planned)
    ]


def _share_text(local: list[Batch] | None, *, count: int, mesh: Mesh) -> list[Batch]:
    """Broadcast the text that the reading rank has read, without pixels, to its sample group."""
    device = mesh.device.torch_device
    if mesh.tp_cp_group.size() == 1:
        assert local is not None
        tensors = [None if tensor is None else _to_device(tensor, device) for tensor in _text_tensors(local)]
    else:
        own = _text_tensors(local) if local is not None else None
        total = count * len(_TEXT)
        tensors = broadcast_tensors(
            own, count=total, source=mesh.tp_cp_source_rank, group=mesh.tp_cp_group, device=device
        )
    batches = []
    for start in range(0, len(tensors), len(_TEXT)):
        token_ids, image_slots, target_rows, targets = tensors[start : start + len(_TEXT)]
        text = replace(EMPTY_BATCH, token_ids=token_ids, image_slots=image_slots)
        batches.append(replace(text, target_rows=target_rows, targets=targets))
    return batches


def _text_tensors(batches: Sequence[Batch]) -> list[torch.Tensor | None]:
    return [getattr(batch, name) for batch in batches for name in _TEXT]


def _share_pixels(local: list[Batch], counts: Sequence[int], *, mesh: Mesh) -> list[torch.Tensor]:
    """Gather the images of each micro-batch from the shares of the sample group."""
    device = mesh.device.torch_device
    # The first stage decodes images, so its batches have pixels.
    parts = [_to_device(batch.pixels, device) for batch in local if batch.pixels is not None]
    if mesh.tp_cp_group.size() == 1:
        return parts
    return gather_interleaved_rows(parts, [int(count) for count in counts], group=mesh.tp_cp_group)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)

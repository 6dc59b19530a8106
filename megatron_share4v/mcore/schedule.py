"""Pipeline schedule of one step: micro-batches in, (loss sum, trained tokens) per micro-batch out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_share4v.mcore.groups import Mesh

# A model chunk's output -> (loss to differentiate, divisor count, record returned to the caller).
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Any]]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Any],
    *,
    mesh: Mesh,
    sequence_length: int,
    micro_batch_size: int,
    loss_function: Callable[[Any], LossFunction],
    forward_only: bool,
    call: Callable[[torch.nn.Module, Any], torch.Tensor] = lambda chunk, batch: chunk(batch),
    on_micro_batch: Callable[[int], None] | None = None,
) -> list[Any]:
    """Run forward and backward over all micro-batches of a step.

    Gradients end up reduced and divided by the summed counts. Each chunk runs as `call(chunk, batch)`;
    `loss_function(batch)` turns the last chunk's output into (loss, count, record). `on_micro_batch` is called with the
    number of each micro-batch, from 0, before a chunk takes it. Returns the records on the last pipeline stage and an
    empty list elsewhere.
    """

    def forward_step(iterator: Any, chunk: torch.nn.Module, *_: Any) -> tuple[torch.Tensor, LossFunction]:
        batch = next(iterator)
        return call(chunk, batch), loss_function(batch)

    def iterate() -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if on_micro_batch is not None:
                on_micro_batch(number)
            yield batch

    records = get_forward_backward_func()(
        forward_step_func=forward_step,
        # Under the interleaved schedule every chunk iterates over the same micro-batches.
        data_iterator=[iterate() for _ in chunks] if len(chunks) > 1 else iterate(),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    return records if mesh.is_last_stage else []


class TimedDDP(DistributedDataParallel):
    """Core's DDP wrapper with a timer for the communication outside forward and backward."""

    communication_timer: Callable[[], AbstractContextManager[Any]]
    """Entered around the reduction of gradients after the last backward pass and around the all-gather of weights."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.communication_timer = nullcontext
        super().__init__(*args, **options)

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """All-gather updated weights, inside the timer."""
        with self.communication_timer():
            super().start_param_sync(*unused, force_sync=force_sync, force_dispatch=force_dispatch)


def set_schedule_hooks(config: Any, chunks: Sequence[torch.nn.Module], *, overlap_grad_reduce: bool) -> None:
    """Set core's hooks for gradient finalization and, with overlap, for delaying the gradient reduction."""
    config.finalize_model_grads_func = _finalize_gradients
    if overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def _finalize_gradients(
    model: Sequence[TimedDDP], num_tokens: torch.Tensor | None, *, pg_collection: Any, **others: Any
) -> None:
    """Reduce gradients as core does, but divide by the token count of the step without a host sync.

    Core checks on the host whether the count is zero.
    """
    with model[0].communication_timer():
        _reduce_and_scale(model, num_tokens, pg_collection=pg_collection, **others)


def _reduce_and_scale(
    model: Sequence[TimedDDP], num_tokens: torch.Tensor | None, *, pg_collection: Any, **others: Any
) -> None:
    finalize_model_grads(model, None, pg_collection=pg_collection, **others)
    if num_tokens is None:
        return
    pipeline = pg_collection.pp
    dist.broadcast(
        num_tokens, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline
    )  # the last stage has the count
    dist.all_reduce(num_tokens, group=pg_collection.dp_cp)
    scale = 1.0 / num_tokens.clamp(min=1)
    for chunk in model:
        chunk.scale_gradients(scale)

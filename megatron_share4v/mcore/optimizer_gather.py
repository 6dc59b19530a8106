"""Optimizer state that data-parallel ranks hold in pieces, put together on the first of them in host memory, to be written as whole tensors.

Core has a function for it. This one takes one copy instead of five, and does its talking later, over whatever group it is told: a save in the
background holds training up for its own rank's copy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_share4v.mcore.async_writer import HostBuffers


@dataclass(frozen=True)
class ParamRange:
    """What one rank keeps of a parameter: its flat elements start .. stop - 1."""

    parameter: torch.nn.Parameter
    start: int
    stop: int


def param_ranges(part: DistributedOptimizer, *, rank: int) -> Iterator[ParamRange]:
    """Those of data-parallel rank `rank`, in an order that all ranks agree on: each bucket of gradients is cut into as many equal shares as there are ranks."""
    size = part.data_parallel_group.size()
    for buffer in part.buffers:
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // size
            first = bucket.offset + rank * share
            for parameter, (begin, end, number) in buffer.param_index_map.items():
                start, stop = max(begin, first), min(end, first + share)
                if number == bucket.bucket_id and start < stop:
                    yield ParamRange(parameter, start - begin, stop - begin)


class OptimizerStateGather:
    """The state of one sharded optimizer. `wholes` fill up when `complete` is called; empty but on the first data-parallel rank."""

    def __init__(
        self,
        part: DistributedOptimizer,
        kept: Mapping[int, Mapping[str, torch.Tensor]],
        *,
        names: tuple[str, ...],
        buffers: HostBuffers | None,
        label: str,
    ) -> None:
        """kept: by the parameter's id, this rank's flat tensors for each of `names`. With `buffers` they are copied now, to those of `label`; else they
        must not change until it is complete.
        """
        self._part, self._names = part, names
        self._ranks = dist.get_process_group_ranks(part.data_parallel_group)
        mine = list(param_ranges(part, rank=part.data_parallel_group.rank()))
        tensors = [kept[id(span.parameter)][name].detach().view(-1) for span in mine for name in names]
        assert [len(tensor) for tensor in tensors] == [span.stop - span.start for span in mine for _ in names], (
            "shares are not cut as core cuts them"
        )
        self.wholes: dict[tuple[int, str], torch.Tensor] = {}
        self._sent: list[torch.Tensor] = []
        if dist.get_rank() != self._ranks[0]:
            self._sent = tensors if buffers is None else buffers.copies(f"share {label}", tensors)
            return
        host = buffers or HostBuffers()
        for buffer in part.buffers:
            for parameter in buffer.param_index_map:
                for name in names:
                    self.wholes[id(parameter), name] = host.whole(f"whole {label} {len(self.wholes)}", parameter.shape)
        for number, span in enumerate(mine):
            for name, tensor in zip(names, tensors[number * len(names) :]):
                self._place(span, name).copy_(tensor, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def complete(self, group: dist.ProcessGroup | None) -> None:
        """Send, or receive, over a group of all ranks for tensors of the host; None: core's own for it. Every rank of the world calls this."""
        group = group or self._part.data_parallel_group_gloo
        if self._sent:
            for tensor in self._sent:
                dist.send(tensor.to("cpu", torch.float32), dst=self._ranks[0], group=group)
        elif self.wholes:
            for number, rank in enumerate(self._ranks[1:], 1):
                for span in param_ranges(self._part, rank=number):
                    for name in self._names:
                        dist.recv(self._place(span, name), src=rank, group=group)
        self._sent = []

    def _place(self, span: ParamRange, name: str) -> torch.Tensor:
        return self.wholes[id(span.parameter), name].view(-1)[span.start : span.stop]

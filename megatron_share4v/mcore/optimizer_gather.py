"""Gather of sharded optimizer state to full tensors in host memory of the first DP rank, for checkpoints.

Core has a function for it; this one makes one copy instead of five and defers communication to `complete`, over any
group: an asynchronous save blocks training only for this rank's copy.
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
    """Flat elements start .. stop - 1 of a parameter, held by one rank."""

    parameter: torch.nn.Parameter
    start: int
    stop: int


def param_ranges(part: DistributedOptimizer, *, rank: int) -> Iterator[ParamRange]:
    """Yield the ranges of DP rank `rank`, in the same order on all ranks.

    Each gradient bucket is split into equal shards, one per rank.
    """
    size = part.data_parallel_group.size()
    for buffer in part.buffers:
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // size
            first = bucket.offset + rank * share
            for parameter, (begin, end, index) in buffer.param_index_map.items():
                start, stop = max(begin, first), min(end, first + share)
                if index == bucket.bucket_id and start < stop:
                    yield ParamRange(parameter, start - begin, stop - begin)


class OptimizerStateGather:
    """Gather of one sharded optimizer's state to the first DP rank.

    `complete` fills `full_tensors`, which are empty on the other ranks.
    """

    def __init__(
        self,
        part: DistributedOptimizer,
        local: Mapping[int, Mapping[str, torch.Tensor]],
        *,
        names: tuple[str, ...],
        buffers: HostBuffers | None,
        label: str,
    ) -> None:
        """Copy this rank's state.

        `local`: by the parameter's id, this rank's flat tensors for each of `names`. With `buffers` they are copied
        now, under `label`; otherwise they must not change until `complete`.
        """
        self._part, self._names = part, names
        self._ranks = dist.get_process_group_ranks(part.data_parallel_group)
        own_ranges = list(param_ranges(part, rank=part.data_parallel_group.rank()))
        tensors = [
            local[id(param_range.parameter)][name].detach().view(-1) for param_range in own_ranges for name in names
        ]
        assert [len(tensor) for tensor in tensors] == [
            param_range.stop - param_range.start for param_range in own_ranges for _ in names
        ], "shards differ from core's"
        self.full_tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._outgoing: list[torch.Tensor] = []
        if dist.get_rank() != self._ranks[0]:
            self._outgoing = tensors if buffers is None else buffers.copy_to_host(f"share {label}", tensors)
            return
        host = buffers or HostBuffers()
        for buffer in part.buffers:
            for parameter in buffer.param_index_map:
                for name in names:
                    self.full_tensors[id(parameter), name] = host.full_buffer(
                        f"whole {label} {len(self.full_tensors)}", parameter.shape
                    )
        for index, param_range in enumerate(own_ranges):
            for name, tensor in zip(names, tensors[index * len(names) :]):
                self._slice(param_range, name).copy_(tensor, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def complete(self, group: dist.ProcessGroup | None) -> None:
        """Send or receive the shards over `group`, a CPU group of all ranks; None: core's own. Collective."""
        group = group or self._part.data_parallel_group_gloo
        if self._outgoing:
            for tensor in self._outgoing:
                dist.send(tensor.to("cpu", torch.float32), dst=self._ranks[0], group=group)
        elif self.full_tensors:
            for index, rank in enumerate(self._ranks[1:], 1):
                for param_range in param_ranges(self._part, rank=index):
                    for name in self._names:
                        dist.recv(self._slice(param_range, name), src=rank, group=group)
        self._outgoing = []

    def _slice(self, param_range: ParamRange, name: str) -> torch.Tensor:
        return self.full_tensors[id(param_range.parameter), name].view(-1)[param_range.start : param_range.stop]

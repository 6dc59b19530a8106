"""How long each rank computes and waits for data, compared with the ranks that do the same work: one slow GPU or disk slows all others down.

A step takes as long on every rank, so it says nothing. What is compared is the time inside the chunks' forward passes: there, only a tensor group
waits for each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.parallel.layout import Layout

NOTICEABLE = 0.05
"""Of a step's time; less is not worth a word."""


@dataclass(frozen=True)
class RankTiming:
    """Seconds per step of one rank: in forward passes, waiting for data, in all."""

    forward_s: float
    data_wait_s: float
    step_s: float


class StragglerMonitor:
    """Times this rank's forward passes and compares them with the others' every so many steps."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, mesh: Mesh, every: int, factor: float) -> None:
        """every: steps, 0 for never; factor: times the median of the others that make a rank slow."""
        self._mesh, self._every, self._factor = mesh, every, factor
        self._spans: list[tuple[object, object]] = []
        self._begun: list[object] = []
        self._steps, self._data_wait_s, self._step_s = 0, 0.0, 0.0
        for chunk in chunks if every else ():
            chunk.register_forward_pre_hook(self._begin)
            chunk.register_forward_hook(self._end)

    def step_ended(self, step: int, *, seconds: float, data_wait_s: float) -> dict[str, float] | None:
        """Count a step. When a comparison is due: what it found, for TensorBoard, and slow ranks are named in the log. Every rank calls this."""
        self._steps, self._data_wait_s, self._step_s = (
            self._steps + 1,
            self._data_wait_s + data_wait_s,
            self._step_s + seconds,
        )
        if not self._every or step % self._every:
            return None
        mine = torch.tensor(
            [self._forward_s(), self._data_wait_s, self._step_s],
            dtype=torch.float64,
            device=self._mesh.device.torch_device,
        )
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine / self._steps)
        self._spans, self._steps, self._data_wait_s, self._step_s = [], 0, 0.0, 0.0
        paces = [RankTiming(*values.tolist()) for values in gathered]
        for line in slow_ranks(paces, self._mesh.layout, factor=self._factor):
            get_logger().warning("step %d: %s", step, line)
        return summary(paces)

    def _begin(self, *_: object) -> None:
        self._begun.append(self._now())

    def _end(self, *_: object) -> None:
        self._spans.append((self._begun.pop(), self._now()))

    def _now(self) -> object:
        if self._mesh.device.kind == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _forward_s(self) -> float:
        if self._mesh.device.kind == "cpu":
            return sum(end - begin for begin, end in self._spans)
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3


def slow_ranks(paces: Sequence[RankTiming], layout: Layout, *, factor: float) -> list[str]:
    """A sentence for each rank that is `factor` times slower than the median of the other ranks of its pipeline stage."""
    found = []
    for rank, pace in enumerate(paces):
        stage = layout.coordinates(rank).pipeline
        others = [
            other
            for number, other in enumerate(paces)
            if number != rank and layout.coordinates(number).pipeline == stage
        ]
        for name, what in (("forward_s", "computes its forward passes"), ("data_wait_s", "waits for data")):
            own, usual = (
                getattr(pace, name),
                statistics.median(getattr(other, name) for other in others) if others else 0.0,
            )
            if others and own > factor * usual and own - usual > NOTICEABLE * pace.step_s:
                found.append(
                    f"rank {rank} is slow: it {what} for {own:.3f} s per step, the others of its stage for {usual:.3f} s"
                )
    return found


def summary(paces: Sequence[RankTiming]) -> dict[str, float]:
    """Scalars by name: median and largest over the ranks, and which rank has the largest."""
    found: dict[str, float] = {}
    for name in ("forward_s", "data_wait_s"):
        values = [getattr(pace, name) for pace in paces]
        found |= {
            f"{name}/median": statistics.median(values),
            f"{name}/largest": max(values),
            f"{name}/of_rank": float(values.index(max(values))),
        }
    return found

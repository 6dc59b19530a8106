"""Straggler detection: forward and data-wait time of each rank, compared with the ranks of the same pipeline stage.

The step time is the same on every rank, so the time inside the forward passes of the model chunks is compared: there,
only the ranks of a TP group wait for each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.parallel.layout import Layout

NOTICEABLE = 0.05
"""Smallest difference that is reported, as a fraction of the step time."""


@dataclass(frozen=True)
class RankTiming:
    """Seconds per step of one rank: in forward passes, waiting for data, in total."""

    forward_s: float
    data_wait_s: float
    step_s: float


class _Clock(Protocol):
    """Sums the time between `start` and `stop` calls, which may nest."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def reset(self) -> None: ...
    def total_s(self) -> float: ...


class _HostClock:
    """Measures with the host's clock."""

    def __init__(self) -> None:
        self._started: list[float] = []
        self._spans: list[tuple[float, float]] = []

    def start(self) -> None:
        self._started.append(time.perf_counter())

    def stop(self) -> None:
        self._spans.append((self._started.pop(), time.perf_counter()))

    def reset(self) -> None:
        self._spans = []

    def total_s(self) -> float:
        return sum(end - begin for begin, end in self._spans)


class _CudaClock:
    """Measures with CUDA events; only `total_s` waits for the device."""

    def __init__(self) -> None:
        self._started: list[torch.cuda.Event] = []
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._started.append(self._record())

    def stop(self) -> None:
        self._spans.append((self._started.pop(), self._record()))

    def reset(self) -> None:
        self._spans = []

    def total_s(self) -> float:
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3

    @staticmethod
    def _record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerMonitor:
    """Times the forward passes of this rank and compares them with other ranks every few steps."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, mesh: Mesh, every: int, factor: float) -> None:
        """Install the timing hooks. every: steps between comparisons, 0 for never; factor: see `find_slow_ranks`."""
        self._mesh, self._every, self._factor = mesh, every, factor
        self._clock: _Clock = _HostClock() if mesh.device.kind == "cpu" else _CudaClock()
        self._steps, self._data_wait_s, self._step_s = 0, 0.0, 0.0
        for chunk in chunks if every else ():
            chunk.register_forward_pre_hook(self._begin)
            chunk.register_forward_hook(self._end)

    def step_ended(self, step: int, *, seconds: float, data_wait_s: float) -> dict[str, float] | None:
        """Count a step; when a comparison is due, log slow ranks and return scalars for TensorBoard.

        Every rank calls this at every step; collective, with a host sync, when a comparison is due.
        """
        self._steps += 1
        self._data_wait_s += data_wait_s
        self._step_s += seconds
        if not self._every or step % self._every:
            return None
        totals = [self._clock.total_s(), self._data_wait_s, self._step_s]
        mine = torch.tensor(totals, dtype=torch.float64, device=self._mesh.device.torch_device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine / self._steps)
        self._clock.reset()
        self._steps, self._data_wait_s, self._step_s = 0, 0.0, 0.0
        timings = [RankTiming(*values.tolist()) for values in gathered]
        for line in find_slow_ranks(timings, self._mesh.layout, factor=self._factor):
            get_logger().warning("step %d: %s", step, line)
        return summarize(timings)

    def _begin(self, *_: object) -> None:
        self._clock.start()

    def _end(self, *_: object) -> None:
        self._clock.stop()


def find_slow_ranks(timings: Sequence[RankTiming], layout: Layout, *, factor: float) -> list[str]:
    """Describe each rank that is `factor` times slower than the median of the other ranks of its pipeline stage."""
    found = []
    for rank, timing in enumerate(timings):
        stage = layout.coordinates(rank).pipeline
        others = [
            other
            for number, other in enumerate(timings)
            if number != rank and layout.coordinates(number).pipeline == stage
        ]
        if not others:
            continue
        for name, what in (("forward_s", "computes its forward passes"), ("data_wait_s", "waits for data")):
            own, usual = getattr(timing, name), statistics.median(getattr(other, name) for other in others)
            if own > factor * usual and own - usual > NOTICEABLE * timing.step_s:
                found.append(
                    f"rank {rank} is slow: it {what} for {own:.3f} s per step, "
                    f"the others of its stage for {usual:.3f} s"
                )
    return found


def summarize(timings: Sequence[RankTiming]) -> dict[str, float]:
    """Return scalars by name: median and maximum over the ranks, and the rank of the maximum."""
    scalars: dict[str, float] = {}
    for name in ("forward_s", "data_wait_s"):
        values = [getattr(timing, name) for timing in timings]
        scalars |= {
            f"{name}/median": statistics.median(values),
            f"{name}/largest": max(values),
            f"{name}/of_rank": float(values.index(max(values))),
        }
    return scalars

"""torch.profiler traces of chosen steps as Chrome JSON (also for Perfetto), with a snapshot of the CUDA allocator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_share4v.config.run import ProfileConfig
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.device import Device


@dataclass(frozen=True)
class _Trace:
    """A trace being recorded."""

    profile: profile
    first_step: int
    config: ProfileConfig


class Profiler:
    """Records steps first_step to last_step of the configuration, on every rank, into `directory`/profile/rank<N>/."""

    def __init__(self, config: ProfileConfig | None, *, directory: Path, device: Device, rank: int) -> None:
        self._config, self._device, self._rank = config, device, rank
        self._folder = directory / "profile" / f"rank{rank}"
        self._trace: _Trace | None = None
        if config is not None and config.memory and device.kind == "cpu":
            get_logger().info(
                "log.profile.memory: the trace includes allocations; the allocator snapshot exists on CUDA only"
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record the block when `step` (1-based) is in range. A step that fails still leaves the trace up to it."""
        config = self._config
        if config is not None and config.first_step <= step <= config.last_step and self._trace is None:
            self._trace = self._start(config, step)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self._trace is not None and (failed or step == self._trace.config.last_step):
                self._stop(self._trace, step)

    def close(self) -> None:
        """Write the trace of a run that ends inside the range."""
        if self._trace is not None:
            self._stop(self._trace, self._trace.config.last_step)

    def _start(self, config: ProfileConfig, step: int) -> _Trace:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.kind == "cuda" else [])]
        trace = _Trace(profile(activities=activities, profile_memory=config.memory), step, config)
        if config.memory and self._device.kind == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        trace.profile.start()
        return trace

    def _stop(self, trace: _Trace, last_step: int) -> None:
        self._trace = None
        self._device.synchronize()
        trace.profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{trace.first_step}_{last_step}"
        trace.profile.export_chrome_trace(str(self._folder / f"{name}.json"))
        if trace.config.memory and self._device.kind == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._rank == 0:
            get_logger().info(
                "profile: traces of steps %d to %d of each rank are in %s",
                trace.first_step,
                last_step,
                self._folder.parent,
            )

"""Traces of chosen steps by torch's profiler, as Chrome JSON (also for Perfetto), and a snapshot of the CUDA allocator beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_share4v.config.run import ProfileConfig
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.device import Device


class Profiler:
    """Follows a run step by step and records those from first_step to last_step, on every rank, into `directory`/profile/rank<N>/."""

    def __init__(self, config: ProfileConfig | None, *, directory: Path, device: Device, rank: int) -> None:
        self._config, self._device, self._rank = config, device, rank
        self._folder = directory / "profile" / f"rank{rank}"
        self._running: profile | None = None
        self._first = 0
        if config is not None and config.memory and device.kind == "cpu":
            get_logger().info(
                "log.profile.memory: the trace will have allocations; a snapshot of the allocator exists on CUDA alone"
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of step number `step`, counted from 1. A step that fails still leaves the trace up to it."""
        wanted = self._config is not None and self._config.first_step <= step <= self._config.last_step
        if wanted and self._running is None:
            self._start(step)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self._running is not None and (failed or step == self._config.last_step):
                self._stop(step)

    def close(self) -> None:
        """Of a run that ends inside the range."""
        if self._running is not None:
            self._stop(self._config.last_step)

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.kind == "cuda" else [])]
        self._first = step
        self._running = profile(activities=activities, profile_memory=self._config.memory)
        if self._config.memory and self._device.kind == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._running.start()

    def _stop(self, last: int) -> None:
        running, self._running = self._running, None
        self._device.synchronize()
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self._first}_{last}"
        running.export_chrome_trace(str(self._folder / f"{name}.json"))
        if self._config.memory and self._device.kind == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._rank == 0:
            get_logger().info(
                "profile: %s has a trace of the steps %d to %d of each rank", self._folder.parent, self._first, last
            )

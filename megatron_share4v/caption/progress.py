"""Periodic progress lines: images done, rates, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from megatron_share4v.caption.records import CaptionRow
from megatron_share4v.logging import get_logger

EVERY_S = 5.0


class Progress:
    """Progress of one process. done: how many of its `total` images an earlier run has finished."""

    def __init__(self, *, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._before, self._clock = total, done, clock
        self._started = self._last = clock()
        self.images = self.tokens = self.errors = 0

    def advance(self, rows: Sequence[CaptionRow]) -> None:
        """Count finished rows; log a line at most every EVERY_S seconds."""
        self.images += len(rows)
        self.tokens += sum(row.tokens for row in rows)
        self.errors += sum(row.error is not None for row in rows)
        if self._clock() - self._last >= EVERY_S:
            self._last = self._clock()
            get_logger().info(str(self))

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(self._clock() - self._started, 1e-9)

    def __str__(self) -> str:
        done, left = self._before + self.images, self._total - self._before - self.images
        eta = f", {timedelta(seconds=round(left * self.seconds / self.images))} left" if self.images and left else ""
        rates = f"{self.images / self.seconds:.2f} images/s, {self.tokens / self.seconds:.1f} tokens/s"
        return f"captioned {done} of {self._total} images ({self.errors} errors): {rates}{eta}"

"""Progress log of a preparation."""

from __future__ import annotations

import time

from megatron_share4v.data.prepare.annotations import AnnotationFile
from megatron_share4v.logging import get_logger

PROGRESS_EVERY_S = 5.0


class PrepareProgress:
    """Progress line every few seconds; the fraction counts bytes read, as the number of records is unknown."""

    def __init__(self, annotations: AnnotationFile, *, done: int) -> None:
        self._annotations, self._first, self._done = annotations, done, done
        self._started = self._last = time.monotonic()
        self._fraction_at_start: float | None = None

    def advance(self, *, rejected: int) -> None:
        """Count one record."""
        self._done += 1
        if self._fraction_at_start is None:
            self._fraction_at_start = self._fraction
        if time.monotonic() - self._last >= PROGRESS_EVERY_S:
            self.report(rejected=rejected)

    def report(self, *, rejected: int) -> None:
        """Log the progress."""
        self._last = time.monotonic()
        seconds = max(self._last - self._started, 1e-9)
        covered = self._fraction - (self._fraction_at_start or 0.0)
        left = (
            f", about {(1 - self._fraction) * seconds / covered:.0f} s left"
            if covered > 0 and self._fraction < 1
            else ""
        )
        rate = (self._done - self._first) / seconds
        get_logger().info(
            f"prepared {self._done} records ({self._fraction:.0%} of the file), "
            f"{rate:.0f} records/s, {rejected} rejected{left}"
        )

    @property
    def _fraction(self) -> float:
        return self._annotations.bytes_read / max(self._annotations.size, 1)

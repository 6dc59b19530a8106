"""The clock of a run: when the next save is due, and when there is just time left to save and end. One rank looks at it and the others follow."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_share4v.config.run import RunConfig
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.launch import scheduled_end


class TimeLimit:
    """Reads the clock `now`, in seconds. Durations of saves are told to it."""

    def __init__(
        self, config: RunConfig, *, now: Callable[[], float] = time.monotonic, clock: Callable[[], float] = time.time
    ) -> None:
        """now: seconds that nobody sets back, unlike those of `clock`, in which the scheduler says its end. Raises ConfigError when the scheduler's time cannot be read."""
        self._now, self._every_s, self._reserve_s = (
            now,
            60.0 * config.checkpoint.every_minutes,
            config.checkpoint.before_time_limit_s,
        )
        self._last_save = self._last_step = now()
        self._longest_step_s = self._longest_save_s = 0.0
        limit = config.run.time_limit_minutes
        scheduled = scheduled_end()
        job = None if scheduled is None else self._last_step + scheduled - clock()
        ends = [end for end in (job, None if limit is None else self._last_step + 60.0 * limit) if end is not None]
        self._end = min(ends, default=None)
        if self._end is not None:
            get_logger().info(
                "time limit: in %.0f min; saved and ended at least %.0f s before",
                (self._end - now()) / 60.0,
                self._reserve_s,
            )

    @property
    def save_is_due(self) -> bool:
        """checkpoint.every_minutes have passed since the last save."""
        return self._every_s > 0 and self._now() - self._last_save >= self._every_s

    @property
    def is_up(self) -> bool:
        """Another step and a save after it may not end checkpoint.before_time_limit_s before the limit."""
        if self._end is None:
            return False
        return self._now() + self._longest_step_s + self._longest_save_s + self._reserve_s >= self._end

    def step_ended(self) -> None:
        """A step, with all that came after it but for saving, is done."""
        self._longest_step_s = max(self._longest_step_s, self._now() - self._last_step)
        self._last_step = self._now()

    def save_began(self) -> None:
        """The next save is due so long after this moment."""
        self._last_save = self._now()

    def training_goes_on(self) -> None:
        """After a save, or what of it training waited for: the time until here is no step's."""
        self._last_step = self._now()

    def save_ended(self, *, seconds: float) -> None:
        """A save is complete, so long after it began. Another thread may say so."""
        self._longest_save_s = max(self._longest_save_s, seconds)

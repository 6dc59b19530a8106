"""Time limit of a run: when a periodic save is due, and when the run must save and end. Evaluated on rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_share4v.config.run import RunConfig
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.launch import scheduled_end


class TimeLimit:
    """Tracks the durations of steps and saves against the time limit of the run and of the scheduler."""

    def __init__(
        self, config: RunConfig, *, now: Callable[[], float] = time.monotonic, clock: Callable[[], float] = time.time
    ) -> None:
        """Read the limits. now: monotonic clock; clock: seconds since 1970, in which the scheduler gives its end.

        Raises ConfigError when the scheduler's end time is not a number.
        """
        self._now, self._reserve_s = now, config.checkpoint.before_time_limit_s
        self._save_interval_s = 60.0 * config.checkpoint.every_minutes
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
        """Whether checkpoint.every_minutes have passed since the last save."""
        return self._save_interval_s > 0 and self._now() - self._last_save >= self._save_interval_s

    @property
    def is_up(self) -> bool:
        """Whether another step and a save may not end checkpoint.before_time_limit_s before the limit."""
        if self._end is None:
            return False
        return self._now() + self._longest_step_s + self._longest_save_s + self._reserve_s >= self._end

    def step_ended(self) -> None:
        """Count a step as ended, with validation and logging after it but without its save."""
        self._longest_step_s = max(self._longest_step_s, self._now() - self._last_step)
        self._last_step = self._now()

    def save_started(self) -> None:
        """Start the interval to the next periodic save."""
        self._last_save = self._now()

    def training_resumed(self) -> None:
        """Exclude the time since the last step, in which training waited for a save, from the next step."""
        self._last_step = self._now()

    def save_ended(self, *, seconds: float) -> None:
        """Count a save as complete; may be called from the thread that writes it."""
        self._longest_save_s = max(self._longest_save_s, seconds)

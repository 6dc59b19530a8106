"""The learning rate over the steps, as a pure function."""

from __future__ import annotations

import math

from megatron_share4v.config.run import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, *, total_steps: int) -> int:
    """Steps of linear warm-up; the ratio is rounded up, as Hugging Face's trainer does."""
    return (
        schedule.warmup_steps if schedule.warmup_steps is not None else math.ceil(schedule.warmup_ratio * total_steps)
    )


def learning_rate_factor(step: int, *, schedule: ScheduleConfig, total_steps: int) -> float:
    """Factor for the update number `step` (0-based): i / warmup while warming up (the first update is 0), then `schedule.kind`.

    The cosine is that of transformers' get_cosine_schedule_with_warmup (half a period), ending at `final_ratio` after `total_steps`.
    """
    warmup = warmup_steps(schedule, total_steps=total_steps)
    if step < warmup:
        return step / warmup
    if schedule.kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * shape

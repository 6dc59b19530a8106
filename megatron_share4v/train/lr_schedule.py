"""Learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math

from megatron_share4v.config.training import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, *, total_steps: int) -> int:
    """Return the steps of linear warm-up; the ratio is rounded up, as Hugging Face's trainer does."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil(schedule.warmup_ratio * total_steps)


def learning_rate_factor(step_index: int, *, schedule: ScheduleConfig, total_steps: int) -> float:
    """Return the factor on the learning rate for an update: linear warm-up, then `schedule.kind`.

    `step_index` is 0-based, so the factor of the first warm-up step is 0. The cosine is that of transformers'
    get_cosine_schedule_with_warmup (half a period) and ends at `final_ratio` after `total_steps`.
    """
    warmup = warmup_steps(schedule, total_steps=total_steps)
    if step_index < warmup:
        return step_index / warmup
    if schedule.kind == "constant":
        return 1.0
    progress = min(1.0, (step_index - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * shape

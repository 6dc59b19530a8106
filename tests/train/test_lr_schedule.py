"""Learning-rate schedules equal those of transformers and the numbers of the recipes."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from megatron_share4v.config.training import ScheduleConfig
from megatron_share4v.train.lr_schedule import learning_rate_factor, warmup_steps


@pytest.mark.parametrize(
    ("kind", "make"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_schedule_equals_transformers(kind, make) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_ratio=0.03)
    total = 123
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = make(optimizer, warmup_steps(schedule, total_steps=total), total)
    for step in range(total):
        assert learning_rate_factor(step, schedule=schedule, total_steps=total) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        )
        optimizer.step()
        reference.step()


def test_warmup_is_rounded_up_and_can_be_set() -> None:
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.03), total_steps=4868) == 147
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.03, warmup_steps=5), total_steps=4868) == 5
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.0), total_steps=100) == 0
    assert learning_rate_factor(0, schedule=ScheduleConfig(warmup_ratio=0.0), total_steps=100) == 1.0


def test_final_ratio_and_constant() -> None:
    schedule = ScheduleConfig(final_ratio=0.1, warmup_steps=0)
    assert learning_rate_factor(100, schedule=schedule, total_steps=100) == pytest.approx(0.1)
    assert learning_rate_factor(77, schedule=ScheduleConfig(kind="constant", warmup_steps=10), total_steps=100) == 1.0

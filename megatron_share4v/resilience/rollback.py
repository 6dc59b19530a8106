"""Rollback to an earlier checkpoint within a run, after bad steps have corrupted the weights.

The steps since the checkpoint are added to the skip list (resilience/skip_steps.py) and their checkpoints are marked as
damaged, so that a run that is killed and restarted afterwards reaches the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_share4v.checkpoint.retention import is_complete, list_checkpoints, mark_damaged
from megatron_share4v.checkpoint.store import load_checkpoint
from megatron_share4v.errors import TrainingError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.optimizer import MegatronOptimizer
from megatron_share4v.parallel.collectives import run_on_rank0
from megatron_share4v.resilience.skip_steps import add_skip_steps


@dataclass(frozen=True)
class BadStepRange:
    """Range of bad steps, `first` to `last`, and the reason of the rollback."""

    first: int
    last: int
    reason: str


def roll_back(
    directory: Path,
    bad_steps: BadStepRange,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
) -> int:
    """Load the newest complete checkpoint from before the last good step; return its step. Collective.

    That checkpoint is older than the weights at which the first bad step occurred. `directory`: run directory.
    Training continues with the step after the last bad one. Raises TrainingError when there is no such checkpoint.
    """
    checkpoints, last_good, last = directory / "checkpoints", bad_steps.first - 1, bad_steps.last

    def select_target() -> int:
        saved = list_checkpoints(checkpoints)
        older = [step for step, path in saved.items() if step < last_good and is_complete(path)]
        if not older:
            raise TrainingError(
                f"{bad_steps.reason}, and {checkpoints} holds no checkpoint from before step {last_good} to roll back "
                "to; save more often, keep more (checkpoint.keep_last), or lower the learning rate"
            )
        return older[-1]

    def discard_later_steps() -> None:
        add_skip_steps(directory, range(target + 1, last + 1), reason=f"rolled back after {bad_steps.reason}")
        for step, path in list_checkpoints(checkpoints).items():
            if step > target:
                mark_damaged(path)

    target = run_on_rank0(select_target)
    get_logger().warning(
        "rolling back to step %d: %s. Steps %d to %d are skipped from now on",
        target,
        bad_steps.reason,
        target + 1,
        last,
    )
    load_checkpoint(list_checkpoints(checkpoints)[target], chunks=chunks, optimizer=optimizer)
    run_on_rank0(discard_later_steps)
    return target

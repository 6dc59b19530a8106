"""Going back to a checkpoint in the middle of a run, because what was trained since has spoiled the weights.

The steps since then are put on the quarantine list (resilience/skip_steps.py) and their checkpoints set aside, so that a run that is killed afterwards and
started again comes to the same weights.
"""

from __future__ import annotations

from megatron_share4v.checkpoint.retention import is_complete, list_checkpoints, mark_damaged
from megatron_share4v.checkpoint.store import load_checkpoint
from megatron_share4v.errors import TrainingError
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.collectives import run_on_rank0
from megatron_share4v.resilience.skip_steps import add_skip_steps
from megatron_share4v.train.build import Training


def roll_back(training: Training, *, first_bad: int, last: int, why: str) -> int:
    """Load the newest whole checkpoint older than the weights that met the bad steps first_bad .. last; the step it is of. Collective.

    Training goes on with step last + 1. Raises TrainingError when there is no such checkpoint.
    """

    def choose() -> int:
        directories = list_checkpoints(training.checkpoints)
        older = [step for step, path in directories.items() if step < first_bad - 1 and is_complete(path)]
        if not older:
            raise TrainingError(
                f"{why}, and {training.checkpoints} holds no checkpoint from before step {first_bad - 1} to roll back to; save more often, keep more "
                "(checkpoint.keep_last), or lower the learning rate"
            )
        return older[-1]

    def remember() -> None:
        add_skip_steps(training.directory, range(target + 1, last + 1), reason=f"rolled back after {why}")
        for step, path in list_checkpoints(training.checkpoints).items():
            if step > target:
                mark_damaged(path)

    target = run_on_rank0(choose)
    get_logger().warning(
        "rolling back to step %d: %s. Steps %d to %d are skipped from now on", target, why, target + 1, last
    )
    load_checkpoint(
        list_checkpoints(training.checkpoints)[target],
        chunks=training.chunks,
        optimizer=training.optimizer,
    )
    run_on_rank0(remember)
    return target

"""Run one engine over several TP ranks: rank 0 broadcasts each step's plan, all ranks execute it, rank 0 samples.

An exception on any rank leaves `run_follower` (or `step` on rank 0) and ends its process; the launcher ends the others,
and a pending gloo collective fails.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_share4v.infer.model_runner import ModelRunner
from megatron_share4v.infer.step_plan import StepPlan
from megatron_share4v.parallel.collectives import broadcast_object

IDLE_TIMEOUT = timedelta(days=3650)
"""Timeout of the plan broadcast, which waits between requests. A peer that exits breaks the connection at once."""


class TPExecutor:
    """Model runners of one model replica, one per TP rank. All ranks of the TP group construct it together."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self._mesh, self._group = runner, runner.mesh, None
        self._first = dist.get_global_rank(runner.mesh.tp_group, 0)
        if runner.mesh.layout.tensor > 1:
            members = dist.get_process_group_ranks(runner.mesh.tp_group)
            # A separate gloo group: plans are host memory, and the collectives of the model keep their timeout.
            self._group = dist.new_group(members, backend="gloo", timeout=IDLE_TIMEOUT, use_local_synchronization=True)

    @property
    def is_leader(self) -> bool:
        """Whether this is TP rank 0, which schedules and samples."""
        return self._mesh.coordinates.tensor == 0

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Logits [R, V] of a step; on TP rank 0."""
        self._send(plan)
        return self.runner.run(plan)

    def close(self) -> None:
        """Make the other ranks leave `run_follower`."""
        self._send(None)

    def receive(self) -> StepPlan | None:
        """Wait for the next message from TP rank 0."""
        assert not self.is_leader
        return broadcast_object(None, source=self._first, group=self._group)

    def _send(self, plan: StepPlan | None) -> None:
        assert self.is_leader, "only TP rank 0 sends plans; the other ranks call run_follower(engine.executor)"
        if self._group is not None:
            broadcast_object(plan, source=self._first, group=self._group)


def run_follower(executor: TPExecutor) -> None:
    """Execute plans from TP rank 0 until it closes its executor."""
    while (plan := executor.receive()) is not None:
        executor.runner.run(plan)

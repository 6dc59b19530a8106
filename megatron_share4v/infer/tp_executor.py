"""One engine over several tensor ranks: the first sends each step's plan, all carry it out, and the first alone decides and answers.

A rank that fails ends the job: its exception leaves `follow` (or `step` on the first rank), its process ends with the traceback, and the launcher
ends the others; where they wait in a collective of gloo, that fails too.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_share4v.infer.model_runner import ModelRunner
from megatron_share4v.infer.step_plan import StepPlan
from megatron_share4v.parallel.collectives import broadcast_object

SHUTDOWN = "leave"
IDLE_TIMEOUT = timedelta(days=3650)
"""Followers wait as long as nobody asks anything. A peer that ends breaks the connection, which is noticed at once."""


class TPExecutor:
    """The runners of one model replica, of which this rank has one. All ranks of the tensor group make theirs together."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self._mesh, self._group = runner, runner.mesh, None
        self._first = dist.get_global_rank(runner.mesh.tp_group, 0)
        if runner.mesh.layout.tensor > 1:
            members = dist.get_process_group_ranks(runner.mesh.tp_group)
            # Of its own: plans are host memory, whatever the model runs on, and the model's collectives keep their time limit.
            self._group = dist.new_group(members, backend="gloo", timeout=IDLE_TIMEOUT, use_local_synchronization=True)

    @property
    def is_leader(self) -> bool:
        """Whether this rank decides; the others follow."""
        return self._mesh.coordinates.tensor == 0

    def run(self, plan: StepPlan) -> torch.Tensor:
        """[R, V] logits; on the first rank."""
        self._send(plan)
        return self.runner.run(plan)

    def close(self) -> None:
        """The others leave `follow`."""
        self._send(SHUTDOWN)

    def receive(self) -> StepPlan | str:
        """What the first rank has sent; waits for it."""
        assert not self.is_leader
        return broadcast_object(None, source=self._first, group=self._group)

    def _send(self, message: StepPlan | str) -> None:
        assert self.is_leader, "only the first rank of a tensor group decides; the others call follow(engine.ranks)"
        if self._group is not None:
            broadcast_object(message, source=self._first, group=self._group)


def run_follower(executor: TPExecutor) -> None:
    """The loop of every rank but the first of its tensor group, until that one closes its own."""
    while (message := executor.receive()) != SHUTDOWN:
        executor.runner.run(message)

"""Callback interface of the step loop, and the state of a step that callbacks read and fill in.

The loop (train/loop.py) calls each hook of all callbacks in the order of its list. Every rank has the same list, since
many hooks make collectives.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from megatron_share4v.resilience.fp8_divergence import Fp8Gap
from megatron_share4v.resilience.shutdown import StepDecision
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.step import StepResult


@dataclass
class StepState:
    """One step of the loop; fields with a default are filled in while the step runs."""

    data: StepData
    skip_list_reason: str | None
    """Why the skip list (resilience/skip_steps.py) has this step; None when it is trained."""
    learning_rate_factor: float
    result: StepResult = field(init=False)
    """Set by the loop after the update, as are the next three."""
    decision: StepDecision = field(init=False)
    save_due: bool = False
    """Whether the loop saves a checkpoint after this step."""
    seconds: float = 0.0
    """Duration of the step, including the wait for data."""
    fp8_gap: Fp8Gap | None = None
    goodput_accounts: dict[str, float] = field(default_factory=dict)
    validation_loss: float | None = None
    faulty_samples: int = 0

    @property
    def step(self) -> int:
        """1-based number of the step."""
        return self.data.step


class Callback:
    """Hooks of one concern of a run. Each does nothing by default."""

    def before_data(self, step: int) -> None:
        """Run before the loop waits for the data of `step`."""

    def before_step(self, state: StepState) -> None:
        """Run before the forward pass, inside the measured time of the step."""

    def during_update(self, state: StepState) -> AbstractContextManager[None]:
        """Return the context of forward, backward and update."""
        return nullcontext()

    def after_step(self, state: StepState) -> None:
        """Run after the update, with the device synchronised."""

    def during_save(self, state: StepState) -> AbstractContextManager[None]:
        """Return the context of saving a checkpoint after a step."""
        return nullcontext()

    def on_run_end(self, status: str) -> None:
        """Run after the last step, in order; not after an error. status: "finished", or "stopped: " and why."""

    def on_error(self, error: BaseException) -> None:
        """Run when an error ends the steps, before it is raised."""

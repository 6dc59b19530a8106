"""FP8 divergence check: compares loss and gradient norm of one micro-batch per DP rank with and without FP8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_share4v.config.precision import PrecisionConfig
from megatron_share4v.errors import PrecisionError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.fp8 import without_fp8


@dataclass(frozen=True)
class Fp8Gap:
    """Relative difference between FP8 and the dtype of the weights; equal on all ranks."""

    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Fp8DivergenceCheck:
    """Periodic comparison of FP8 with the dtype of the weights. The step must zero the gradient buffers afterwards."""

    precision: PrecisionConfig
    chunks: Sequence[torch.nn.Module]

    def is_due(self, step: int) -> bool:
        """Return whether `step` is checked: the first one and every precision.guard_every_steps after it."""
        every = self.precision.guard_every_steps
        return bool(every) and (step - 1) % every == 0

    def check(self, step: int, measure: Callable[[], tuple[float, float]]) -> Fp8Gap:
        """Compare `measure` with and without FP8; it returns (loss, gradient norm) of this step. Collective.

        Raises PrecisionError, on every rank, when a gap is above its limit.
        """
        loss, norm = measure()
        with without_fp8(self.chunks):
            reference_loss, reference_norm = measure()
        gap = Fp8Gap(_relative_difference(loss, reference_loss), _relative_difference(norm, reference_norm))
        get_logger().info(
            "FP8 divergence: step %d, loss %.5f in FP8, %.5f without (gap %.2e); gradient norm gap %.2e",
            step,
            loss,
            reference_loss,
            gap.loss,
            gap.grad_norm,
        )
        self._raise_above_limits(gap, step)
        return gap

    def _raise_above_limits(self, gap: Fp8Gap, step: int) -> None:
        limits = self.precision
        checked = (
            ("loss", gap.loss, "guard_loss_gap", limits.guard_loss_gap),
            ("gradient norm", gap.grad_norm, "guard_norm_gap", limits.guard_norm_gap),
        )
        exceeded = [
            f"{what} is {value:.2e} away from {limits.dtype}, more than precision.{name} {limit:g}"
            for what, value, name, limit in checked
            if not value <= limit
        ]
        if exceeded:
            raise PrecisionError(
                f"before step {step}: FP8 ({limits.fp8}): {'; '.join(exceeded)}. This step was not trained. "
                "Continue from the last checkpoint with precision.fp8_first_layers and fp8_last_layers, with "
                "precision.fp8_weight_gradient dtype, or with precision.fp8 none, and checkpoint.accept_changes true"
            )


def _relative_difference(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-12)

"""The guard of FP8: from time to time one micro-batch of each data-parallel rank goes through the model twice, in FP8 and in the type of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_share4v.config.precision import PrecisionConfig
from megatron_share4v.errors import PrecisionError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.fp8 import without_fp8
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import MegatronOptimizer
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.step import gradients_of


@dataclass(frozen=True)
class Gap:
    """Of FP8 from the type of the weights, relative; equal on all ranks."""

    loss: float
    norm: float
    """Of the gradient norm."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Watches the model that `chunks` are part of. Gradient buffers are left as they are at the start of a step: to be zeroed."""

    precision: PrecisionConfig
    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    mesh: Mesh
    micro_batch_size: int

    def check(self, step: int, data: StepData) -> Gap | None:
        """None when it is not time. Collective. Raises PrecisionError, on every rank, when a gap is above its bound."""
        every = self.precision.guard_every_steps
        if not every or (step - 1) % every:
            return None
        # The interleaved schedule wants as many micro-batches as pipeline ranks.
        count = self.mesh.layout.pipeline if self.mesh.layout.virtual > 1 else 1
        loss, norm = self._run(data, count)
        with without_fp8(self.chunks):
            true_loss, true_norm = self._run(data, count)
        gap = Gap(_relative(loss, true_loss), _relative(norm, true_norm))
        get_logger().info(
            "guard: step %d, loss %.5f in FP8, %.5f without (gap %.2e); gradient norm gap %.2e",
            step,
            loss,
            true_loss,
            gap.loss,
            gap.norm,
        )
        self._refuse(gap, step)
        return gap

    def _run(self, data: StepData, count: int) -> tuple[float, float]:
        found = gradients_of(
            self.chunks,
            self.optimizer,
            data,
            mesh=self.mesh,
            micro_batch_size=self.micro_batch_size,
            normalize="tokens",
            micro_batches=count,
        )
        return found.loss, found.norm

    def _refuse(self, gap: Gap, step: int) -> None:
        limits = self.precision
        wrong = [
            f"{what} is {found:.2e} away from {limits.dtype}, more than precision.{name} {limit:g}"
            for what, found, name, limit in (
                ("loss", gap.loss, "guard_loss_gap", limits.guard_loss_gap),
                ("gradient norm", gap.norm, "guard_norm_gap", limits.guard_norm_gap),
            )
            if not found <= limit
        ]
        if wrong:
            raise PrecisionError(
                f"before step {step}: FP8 ({limits.fp8}): {'; '.join(wrong)}. Nothing of this step was trained. Go on from the last checkpoint with "
                "precision.fp8_first_layers and fp8_last_layers, with precision.fp8_weight_gradient dtype, or with precision.fp8 none, and checkpoint.accept_changes true"
            )


def _relative(value: float, truth: float) -> float:
    return abs(value - truth) / max(abs(truth), 1e-12)

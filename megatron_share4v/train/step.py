"""One optimizer step, or one validation pass, over all micro-batches of this rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_share4v.data.records import Batch
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import (
    MegatronOptimizer,
    TimedDDP,
    clip_gradients,
    gather_updated_params,
    set_learning_rate,
    squared_grad_norm,
)
from megatron_share4v.mcore.schedule import run_schedule
from megatron_share4v.model.loss import TokenLoss, loss_and_divisor
from megatron_share4v.parallel.device import to_device_async
from megatron_share4v.resilience.spike_detection import describe_non_finite
from megatron_share4v.train.data_feed import StepData

Normalize = Literal["tokens", "microbatch"]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings and hooks that all steps of a run share."""

    mesh: Mesh
    micro_batch_size: int
    normalize: Normalize = "tokens"
    clip_grad_norm: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    detect_bad_step: Callable[[float, float], str] = describe_non_finite
    """(loss, gradient norm) -> why the update is skipped, "" to update. Must return the same on all ranks."""
    control_flags: Callable[[], Sequence[float]] = tuple
    """Reads this rank's control flags (resilience/shutdown.py) when its loss is known."""
    on_micro_batch: Callable[[int], None] | None = None
    """Called with the number of each micro-batch, from 0, when its forward pass begins."""


@dataclass(frozen=True)
class StepResult:
    """Result of one step, equal on all ranks but for `own_losses`."""

    loss: float
    """Mean over the trained tokens of the step (`tokens`) or mean of micro-batch means (`microbatch`)."""
    grad_norm: float
    """Gradient norm before clipping."""
    trained_tokens: int
    skip_reason: str = ""
    """Why weights and optimizer state were left unchanged; "" when they were updated."""
    control_flags: tuple[float, ...] = ()
    """Control flags summed over all ranks."""
    own_losses: tuple[TokenLoss, ...] = ()
    """Losses of the micro-batches whose loss this rank computed."""

    @property
    def skipped(self) -> bool:
        """Whether weights and optimizer state were left unchanged."""
        return bool(self.skip_reason)


@dataclass(frozen=True)
class Gradients:
    """Loss and gradient norm of a step whose gradients are in their buffers; fields as in StepResult."""

    loss: float
    trained_tokens: int
    norm: float
    control_flags: tuple[float, ...]
    own_losses: tuple[TokenLoss, ...]


def train_step(
    chunks: Sequence[TimedDDP],
    optimizer: MegatronOptimizer,
    data: StepData,
    *,
    settings: StepSettings,
    learning_rate_factor: float,
) -> StepResult:
    """Run forward, backward, clipping and the update; skip the update when `settings.detect_bad_step` gives a reason.

    Control flags are summed in the all-reduce of the loss, so they cost no further collective.
    """
    gradients = compute_gradients(chunks, optimizer, data, settings=settings)
    set_learning_rate(optimizer, learning_rate_factor)
    skip_reason = settings.detect_bad_step(gradients.loss, gradients.norm)
    if not skip_reason:
        if settings.clip_grad_norm > 0:
            clip_gradients(optimizer, max_norm=settings.clip_grad_norm, norm=gradients.norm)
        optimizer.step_with_ready_grads()
    return StepResult(
        loss=gradients.loss,
        grad_norm=gradients.norm,
        trained_tokens=gradients.trained_tokens,
        skip_reason=skip_reason,
        control_flags=gradients.control_flags,
        own_losses=gradients.own_losses,
    )


def skip_step(reason: str, *, settings: StepSettings) -> StepResult:
    """Train nothing, for `reason`, but sum the control flags. The samples of the step count as consumed. Collective."""
    *_, flags = reduce_losses((), settings=settings, control_flags=settings.control_flags())
    return StepResult(math.nan, math.nan, 0, skip_reason=reason, control_flags=flags)


def compute_gradients(
    chunks: Sequence[TimedDDP],
    optimizer: MegatronOptimizer,
    data: StepData,
    *,
    settings: StepSettings,
    micro_batches: int | None = None,
) -> Gradients:
    """Run forward and backward over the first `micro_batches` of this rank (None: all).

    There is one host sync, at the end, for loss, control flags and gradient norm together.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    selected = data if micro_batches is None else replace(data, batches=data.batches[:micro_batches])
    losses = run_micro_batches(chunks, selected, settings=settings, forward_only=False)
    sums = _sum_losses(losses, settings=settings, control_flags=settings.control_flags())
    optimizer.prepare_grads()
    squared_norm = squared_grad_norm(optimizer, device=settings.mesh.device.torch_device)
    *values, square = torch.cat([sums, squared_norm.double()]).tolist()
    loss, tokens, flags = _unpack_sums(values)
    return Gradients(loss, tokens, square**0.5, flags, tuple(losses))


@torch.no_grad()
def validation_loss(chunks: Sequence[TimedDDP], steps: Sequence[StepData], *, settings: StepSettings) -> float:
    """Return the mean loss over the trained tokens of `steps`, 0 when they have none. Collective."""
    settings = replace(settings, normalize="tokens", on_micro_batch=None)
    gather_updated_params(chunks)
    losses: list[TokenLoss] = []
    for data in steps:
        losses += run_micro_batches(chunks, data, settings=settings, forward_only=True)
    return reduce_losses(losses, settings=settings)[0]


def run_micro_batches(
    chunks: Sequence[torch.nn.Module], data: StepData, *, settings: StepSettings, forward_only: bool
) -> list[TokenLoss]:
    """Run forward, and backward unless `forward_only`; return the losses of the micro-batches on the last stage."""
    is_first_cp_rank = settings.mesh.coordinates.context == 0

    def loss_function(batch: Batch) -> Any:
        def reduce_loss(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, TokenLoss]:
            assert batch.targets is not None  # the last stage has targets
            tokens = batch.targets.numel()
            whole = tokens if batch.trained is None else batch.trained
            loss, divisor = loss_and_divisor(
                total, tokens=tokens, whole=whole, first=is_first_cp_rank, normalize=settings.normalize
            )
            return loss, divisor, TokenLoss(total.detach(), tokens, whole)

        return reduce_loss

    return run_schedule(
        chunks,
        data.batches,
        mesh=settings.mesh,
        sequence_length=data.items.sequence_length,
        micro_batch_size=settings.micro_batch_size,
        loss_function=loss_function,
        forward_only=forward_only,
        on_micro_batch=settings.on_micro_batch,
    )


def reduce_losses(
    losses: Sequence[TokenLoss], *, settings: StepSettings, control_flags: Sequence[float] = ()
) -> tuple[float, int, tuple[float, ...]]:
    """Return (loss, trained tokens, control flags) summed over all ranks. Collective; one host sync."""
    return _unpack_sums(_sum_losses(losses, settings=settings, control_flags=control_flags).tolist())


def _sum_losses(losses: Sequence[TokenLoss], *, settings: StepSettings, control_flags: Sequence[float]) -> torch.Tensor:
    """Return [3 + flags] fp64 on the device, summed over all ranks: loss, its weight, trained tokens, control flags.

    TP rank 0 of the last stage contributes the loss of its positions; every rank contributes its flags. No host sync.
    """
    mesh, device = settings.mesh, settings.mesh.device.torch_device
    total, weight, tokens = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    if mesh.is_last_stage and mesh.coordinates.tensor == 0:
        for part in losses:
            if settings.normalize == "tokens":
                total, weight = total + part.total.double(), weight + part.tokens
            else:  # CP rank 0 alone counts a micro-batch that several CP ranks share
                total = total + part.total.double() / max(part.whole, 1)
                weight += min(part.whole, 1) * (mesh.coordinates.context == 0)
            tokens += part.tokens
    from_host = torch.tensor([weight, tokens, *control_flags], dtype=torch.float64)
    sums = torch.cat([total.view(1), to_device_async(from_host, device)])
    dist.all_reduce(sums)
    return sums


def _unpack_sums(sums: Sequence[float]) -> tuple[float, int, tuple[float, ...]]:
    """Convert the sums of `_sum_losses` to (loss, trained tokens, control flags)."""
    total, weight, tokens, *flags = sums
    return (total / weight if weight else 0.0), int(tokens), tuple(flags)

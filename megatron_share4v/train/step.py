"""One optimizer step, and one validation pass, over all micro-batches of this rank."""

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
    clip_gradients,
    gather_updated_params,
    set_learning_rate,
    squared_grad_norm,
)
from megatron_share4v.mcore.schedule import run_schedule
from megatron_share4v.model.loss import TokenLoss, loss_and_divisor
from megatron_share4v.parallel.device import to_device_async
from megatron_share4v.train.data_feed import StepData

Normalize = Literal["tokens", "microbatch"]


@dataclass(frozen=True)
class StepResult:
    """Equal on all ranks."""

    loss: float
    """Mean over the trained tokens of the step (`tokens`) or mean of micro-batch means (`microbatch`)."""
    grad_norm: float
    """Before clipping."""
    trained_tokens: int
    bad: str = ""
    """Why weights and optimizer state were left alone (train/bad_steps.py); "": they were not."""
    votes: tuple[float, ...] = ()
    """Those of all ranks, added up."""
    own_losses: tuple[TokenLoss, ...] = ()
    """Not equal on all ranks: of the micro-batches whose loss this rank computed."""

    @property
    def skipped(self) -> bool:
        """Whether weights and optimizer state were left alone."""
        return bool(self.bad)


@dataclass(frozen=True)
class Gradients:
    """What is known when they lie in their buffers, as in StepResult."""

    loss: float
    tokens: int
    norm: float
    votes: tuple[float, ...]
    own_losses: tuple[TokenLoss, ...]


def not_finite(loss: float, norm: float) -> str:
    """What is bad about a step whatever came before. Both numbers are of the whole step, so every rank comes to the same."""
    wrong = [
        f"{name} is {value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(value)
    ]
    return " and ".join(wrong)


def train_step(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    data: StepData,
    *,
    mesh: Mesh,
    micro_batch_size: int,
    normalize: Normalize,
    learning_rate_factor: float,
    clip_grad_norm: float,
    judge: Callable[[float, float], str] = not_finite,
    votes: Callable[[], Sequence[float]] = tuple,
) -> StepResult:
    """Forward, backward, clip, update; no update when `judge` finds loss and gradient norm bad, for the same reason on all ranks.

    What `votes` gives on each rank when its loss is known travels with the loss, so agreeing costs no message.
    """
    found = gradients_of(
        chunks, optimizer, data, mesh=mesh, micro_batch_size=micro_batch_size, normalize=normalize, votes=votes
    )
    set_learning_rate(optimizer, learning_rate_factor)
    bad = judge(found.loss, found.norm)
    if not bad:
        if clip_grad_norm > 0:
            clip_gradients(optimizer, max_norm=clip_grad_norm, norm=found.norm)
        optimizer.step_with_ready_grads()
    return StepResult(
        loss=found.loss,
        grad_norm=found.norm,
        trained_tokens=found.tokens,
        bad=bad,
        votes=found.votes,
        own_losses=found.own_losses,
    )


def pass_over(reason: str, *, mesh: Mesh, votes: Callable[[], Sequence[float]]) -> StepResult:
    """A step that trains nothing, for `reason`. Its samples count as consumed."""
    *_, agreed = _reduce((), mesh=mesh, normalize="tokens", votes=votes())
    return StepResult(loss=math.nan, grad_norm=math.nan, trained_tokens=0, bad=reason, votes=agreed)


def gradients_of(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    data: StepData,
    *,
    mesh: Mesh,
    micro_batch_size: int,
    normalize: Normalize,
    votes: Callable[[], Sequence[float]] = tuple,
    micro_batches: int | None = None,
) -> Gradients:
    """Forward and backward. `micro_batches`: only so many of this rank; None: all.

    The host waits for the device once, at the end, for loss, votes and norm together.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    some = data if micro_batches is None else replace(data, batches=data.batches[:micro_batches])
    losses = _run(chunks, some, mesh=mesh, micro_batch_size=micro_batch_size, normalize=normalize, forward_only=False)
    sums = _summed(losses, mesh=mesh, normalize=normalize, votes=votes())
    optimizer.prepare_grads()
    squared = squared_grad_norm(optimizer, device=mesh.device.torch_device)
    *told, square = torch.cat([sums, squared.double()]).tolist()
    loss, tokens, agreed = _told(told)
    return Gradients(loss, tokens, square**0.5, agreed, tuple(losses))


@torch.no_grad()
def validation_loss(
    chunks: Sequence[torch.nn.Module], steps: Sequence[StepData], *, mesh: Mesh, micro_batch_size: int
) -> float:
    """Mean loss over the trained tokens of `steps`; 0 when they have none."""
    gather_updated_params(chunks)
    losses: list[TokenLoss] = []
    for data in steps:
        losses += _run(
            chunks, data, mesh=mesh, micro_batch_size=micro_batch_size, normalize="tokens", forward_only=True
        )
    return _reduce(losses, mesh=mesh, normalize="tokens")[0]


def _run(
    chunks: Sequence[torch.nn.Module],
    data: StepData,
    *,
    mesh: Mesh,
    micro_batch_size: int,
    normalize: Normalize,
    forward_only: bool,
) -> list[TokenLoss]:
    def loss_function(batch: Batch) -> Any:
        def count(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, TokenLoss]:
            tokens = batch.targets.numel()
            whole = tokens if batch.trained is None else batch.trained
            first = mesh.coordinates.context == 0
            return *loss_and_divisor(total, tokens=tokens, whole=whole, first=first, normalize=normalize), TokenLoss(
                total.detach(), tokens, whole
            )

        return count

    return run_schedule(
        chunks,
        data.batches,
        mesh=mesh,
        sequence_length=data.items.sequence_length,
        micro_batch_size=micro_batch_size,
        loss_function=loss_function,
        forward_only=forward_only,
    )


def _reduce(
    losses: Sequence[TokenLoss], *, mesh: Mesh, normalize: Normalize, votes: Sequence[float] = ()
) -> tuple[float, int, tuple[float, ...]]:
    """(loss, trained tokens, sums of votes) of all ranks."""
    return _told(_summed(losses, mesh=mesh, normalize=normalize, votes=votes).tolist())


def _summed(losses: Sequence[TokenLoss], *, mesh: Mesh, normalize: Normalize, votes: Sequence[float]) -> torch.Tensor:
    """[3 + votes] fp64 on the device, summed over all ranks: losses, their weights, trained tokens, votes. The last stage's first tensor ranks
    speak, each for its positions; every rank votes. Nothing is asked of the device."""
    device = mesh.device.torch_device
    total, weight, tokens = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    if mesh.is_last_stage and mesh.coordinates.tensor == 0:
        for part in losses:
            if normalize == "tokens":
                total, weight = total + part.total.double(), weight + part.tokens
            else:  # one rank counts a micro-batch that several share
                total, weight = (
                    total + part.total.double() / max(part.whole, 1),
                    weight + min(part.whole, 1) * (mesh.coordinates.context == 0),
                )
            tokens += part.tokens
    known = torch.tensor([weight, tokens, *votes], dtype=torch.float64)
    sums = torch.cat([total.view(1), to_device_async(known, device)])
    dist.all_reduce(sums)
    return sums


def _told(sums: Sequence[float]) -> tuple[float, int, tuple[float, ...]]:
    """As `_reduce`, of what `_summed` has come to."""
    total, weight, tokens, *agreed = sums
    return (total / weight if weight else 0.0), int(tokens), tuple(agreed)

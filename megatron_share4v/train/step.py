"""One optimizer step, and one validation pass, over all micro-batches of this rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_share4v.data.sample import Batch
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import MegatronOptimizer, clip_gradients, gather_weights, set_learning_rate
from megatron_share4v.mcore.schedule import run_schedule
from megatron_share4v.model.loss import TokenLoss, divisor
from megatron_share4v.train.feed import StepData

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


def not_finite(loss: float, norm: float) -> str:
    """What is bad about a step whatever came before. Both numbers are of the whole step, so every rank comes to the same."""
    wrong = [f"{name} is {value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(value)]
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
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = _run(chunks, data, mesh=mesh, micro_batch_size=micro_batch_size, normalize=normalize, forward_only=False)
    loss, tokens, agreed = _reduce(losses, mesh=mesh, normalize=normalize, votes=votes())
    set_learning_rate(optimizer, learning_rate_factor)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    bad = judge(loss, norm)
    if not bad:
        if clip_grad_norm > 0:
            clip_gradients(optimizer, max_norm=clip_grad_norm, norm=norm)
        optimizer.step_with_ready_grads()
    return StepResult(loss=loss, grad_norm=norm, trained_tokens=tokens, bad=bad, votes=agreed, own_losses=tuple(losses))


def pass_over(reason: str, *, mesh: Mesh, votes: Callable[[], Sequence[float]]) -> StepResult:
    """A step that trains nothing, for `reason`. Its samples count as consumed."""
    *_, agreed = _reduce((), mesh=mesh, normalize="tokens", votes=votes())
    return StepResult(loss=math.nan, grad_norm=math.nan, trained_tokens=0, bad=reason, votes=agreed)


@torch.no_grad()
def validation_loss(chunks: Sequence[torch.nn.Module], steps: Sequence[StepData], *, mesh: Mesh, micro_batch_size: int) -> float:
    """Mean loss over the trained tokens of `steps`; 0 when they have none."""
    gather_weights(chunks)
    losses: list[TokenLoss] = []
    for data in steps:
        losses += _run(chunks, data, mesh=mesh, micro_batch_size=micro_batch_size, normalize="tokens", forward_only=True)
    return _reduce(losses, mesh=mesh, normalize="tokens")[0]


def _run(chunks: Sequence[torch.nn.Module], data: StepData, *, mesh: Mesh, micro_batch_size: int, normalize: Normalize, forward_only: bool) -> list[TokenLoss]:
    def loss_function(batch: Batch) -> Any:
        def count(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, TokenLoss]:
            tokens = batch.targets.numel()
            return *divisor(total, tokens=tokens, normalize=normalize), TokenLoss(total.detach(), tokens)

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


def _reduce(losses: Sequence[TokenLoss], *, mesh: Mesh, normalize: Normalize, votes: Sequence[float] = ()) -> tuple[float, int, tuple[float, ...]]:
    """(loss, trained tokens, sums of votes) of all ranks. The last stage's first tensor rank speaks for its replica; every rank votes."""
    sums = torch.zeros(3, dtype=torch.float64)
    if mesh.holds_last_stage and mesh.coordinates.tensor == 0:
        for part in losses:
            mean_weight = part.tokens if normalize == "tokens" else 1
            value = float(part.total) if normalize == "tokens" else float(part.total) / max(part.tokens, 1)
            sums += torch.tensor([value, mean_weight if part.tokens else 0, part.tokens], dtype=torch.float64)
    sums = torch.cat([sums, torch.tensor(votes, dtype=torch.float64)]).to(mesh.device.torch_device)
    dist.all_reduce(sums)
    total, weight, tokens, *agreed = sums.tolist()
    return (total / weight if weight else 0.0), int(tokens), tuple(agreed)

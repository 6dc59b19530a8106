"""Token losses of one micro-batch as a sum and a count, divided once by the global count of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class TokenLoss:
    """Detached loss of one micro-batch: summed loss (fp32 scalar tensor) and trained tokens of this rank's positions.

    `whole`: trained tokens of all CP ranks' positions.
    """

    total: torch.Tensor
    tokens: int
    whole: int


def loss_and_divisor(
    total: torch.Tensor, *, tokens: int, whole: int, first: bool, normalize: Literal["tokens", "microbatch"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss to differentiate and what its gradient is later divided by (summed over micro-batches and ranks).

    `tokens`: the sum and its count, so that the result does not depend on the layout. `microbatch`: the mean, counted
    once per micro-batch that trains anything, which reproduces LLaVA's mean of per-device means; of the CP ranks that
    share the micro-batch's `whole` tokens, the `first` counts it.
    """
    if normalize == "microbatch":
        total, tokens = total / max(whole, 1), min(whole, 1) if first else 0
    # Filled on the device: copying a host number there would cost a host sync.
    return total, torch.full((), tokens, dtype=torch.int, device=total.device)

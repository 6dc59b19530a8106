"""Core's MLP with one call between its matrices, which also takes the bias of fc1: the place of the fused activations.

x [..., F] (gated: [..., 2 F], gate first), bias [F] or None -> [..., F].
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP


class ActivatedMLP(MLP):
    """Core's MLP with `config.activation` between the matrices."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[..., W] -> ([..., W], None).

        The second bias is added here: returned to the caller, it would leave core's recomputation as one of its
        results, which makes the weight part of a graph that ends in itself.
        """
        assert per_token_scale is None, "per_token_scale is for experts"
        between, bias = self.linear_fc1(hidden_states)
        output, bias = self.linear_fc2(self.config.activation(between, bias=bias))
        return (output if bias is None else output + bias), None

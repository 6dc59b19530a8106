"""Two matrices and what lies between them. Core's MLP with one call there, which takes the bias of the first: where fused activations go.

x [..., F] (gated: [..., 2 F], gate first), bias [F] or None -> [..., F].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP


def swiglu(x: torch.Tensor, *, bias: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up; Shazeer 2020."""
    gate, up = _biased(x, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x: torch.Tensor, *, bias: torch.Tensor | None) -> torch.Tensor:
    """With erf, as in LLaVA's projector; core's fused form is the tanh approximation."""
    return F.gelu(_biased(x, bias))


def quick_gelu(x: torch.Tensor, *, bias: torch.Tensor | None) -> torch.Tensor:
    """CLIP's activation, x * sigmoid(1.702 x). Core's own is handed to torch.compile, which wants a compiler at run time and recompiles for each shape."""
    x = _biased(x, bias)
    return x * torch.sigmoid(1.702 * x)


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias


class ActivatedMLP(MLP):
    """Core's, with `config.activation` between the matrices."""

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[..., W] -> ([..., W], bias that the caller adds)."""
        assert per_token_scale is None, "this MLP is no expert"
        between, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.config.activation(between, bias=bias))

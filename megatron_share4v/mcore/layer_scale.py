"""Attention and MLP with layer scale (Touvron et al. 2021): a learned vector times the output, before the residual sum.

The output is scaled with its bias. It is already reduced over the TP group, so the vector and its gradient are equal on
all TP ranks. W: width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_share4v.mcore.mlp import ActivatedMLP


def _new_scale(config: TransformerConfig) -> torch.nn.Parameter:
    assert not config.sequence_parallel, "each TP rank would have the gradient of its own positions"
    return torch.nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))


class ScaledSelfAttention(SelfAttention):
    """Core's self-attention, times `layer_scale` [W]."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.layer_scale = _new_scale(config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """[..., W] -> ([..., W], None)."""
        output, bias = super().forward(*args, **kwargs)
        return (output if bias is None else output + bias) * self.layer_scale, None


class ScaledMLP(ActivatedMLP):
    """ActivatedMLP, times `layer_scale` [W]."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.layer_scale = _new_scale(config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """[..., W] -> ([..., W], None)."""
        output, bias = super().forward(*args, **kwargs)
        assert bias is None, "ActivatedMLP adds it"
        return output * self.layer_scale, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the entries of the layers and of `layer_scale`; core's MLP leaves out parameters of its own."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)

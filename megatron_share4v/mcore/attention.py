"""Core attention on torch's scaled_dot_product_attention: runs on CPU and GPU, without Transformer Engine.

Shapes: q, k, v [S, B, heads, head_dim] with B samples of S positions; the result is [S, B, heads * head_dim].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class ScaledDotProductAttention(MegatronModule):
    """Attention of one layer over its own tensor-parallel heads; causal or full, by `attn_mask_type`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        assert config.context_parallel_size == 1 and not config.attention_dropout, "neither context parallelism nor dropout here"
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask), attn_mask_type
        self.causal = attn_mask_type is AttnMaskType.causal
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Causality comes from the layer spec, so that no mask is ever materialised."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None, "this attention takes no explicit mask and no packs"
        length, batch = query.shape[:2]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.size(1) != key.size(1)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.softmax_scale, enable_gqa=grouped)
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

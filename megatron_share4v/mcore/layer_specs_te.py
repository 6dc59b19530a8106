"""What Transformer Engine puts into a layer: matrix products (bf16, and FP8 by the recipe in core's configuration) and attention with cuDNN.

Norms stay ours, beside the matrices and not inside, so that weights have the same names with and without it and checkpoints do not know the difference.
Scales of the recipe `delayed` are not in checkpoints: they are found again within its history (one step) after a resume. Import this only where transformer_engine.py
finds nothing missing. Written against Transformer Engine 2.20 and megatron-core 0.16; tests/gpu runs it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_share4v.mcore.attention import AttentionMetadata, CoreAttention
from megatron_share4v.mcore.layer_config import LayerConfig

COLUMN, ROW = TEColumnParallelLinear, TERowParallelLinear


def _alone(config: LayerConfig) -> LayerConfig:
    """For an attention that knows nothing of context parallelism: its share of the heads, at all positions (ulysses.py)."""
    if config.context_parallel_size == 1:
        return config
    alone = copy.copy(config)
    per_tensor_rank = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
    alone.num_attention_heads = config.num_attention_heads // config.context_parallel_size
    alone.num_query_groups = max(per_tensor_rank // config.context_parallel_size, 1) * config.tensor_model_parallel_size
    alone.context_parallel_size = 1
    return alone


class TEAttention(CoreAttention):
    """Rotary positions as everywhere, then Transformer Engine's kernels; packs in its `thd` format, which keeps samples apart."""

    def __init__(
        self, config: LayerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **others: Any
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, **others)
        self.mask = attn_mask_type
        self.engine = TEDotProductAttention(
            _alone(config),
            layer_number,
            attn_mask_type,
            attention_type,
            softmax_scale=self.softmax_scale,
            cp_comm_type=others.get("cp_comm_type"),
            pg_collection=others.get("pg_collection"),
        )
        self.kernel = self._run

    def _run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, at: AttentionMetadata, **_: Any
    ) -> torch.Tensor:
        """Causality and scale are the module's own."""
        if at.lengths is None:
            return self.engine(query, key, value, None, self.mask)
        length, batch = query.shape[:2]
        flat = [x.transpose(0, 1).flatten(0, 1).contiguous() for x in (query, key, value)]
        ends, longest = at.ends, at.longest
        packs = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        context = self.engine(*flat, None, self.mask, packed_seq_params=packs)
        return context.reshape(batch, length, -1).transpose(0, 1).contiguous()

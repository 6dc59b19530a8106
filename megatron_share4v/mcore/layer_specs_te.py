"""Layer modules of Transformer Engine: matrix products (bf16 or FP8) and cuDNN attention.

FP8 follows the recipe in core's configuration. Norms stay separate modules, so that weights and checkpoints have the
same names with and without Transformer Engine. Scales of the recipe `delayed` are not checkpointed: they are recomputed
within its history (one step) after a resume. Import this only where transformer_engine.py finds nothing missing.
Written against Transformer Engine 2.20 and megatron-core 0.16; tests/gpu runs it.
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


def _without_context_parallel(config: LayerConfig) -> LayerConfig:
    """Configuration of attention over this CP rank's share of the heads at all positions (ulysses.py)."""
    if config.context_parallel_size == 1:
        return config
    local = copy.copy(config)
    per_tensor_rank = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
    local.num_attention_heads = config.num_attention_heads // config.context_parallel_size
    local.num_query_groups = max(per_tensor_rank // config.context_parallel_size, 1) * config.tensor_model_parallel_size
    local.context_parallel_size = 1
    return local


class TEAttention(CoreAttention):
    """Rotary positions as in CoreAttention, then Transformer Engine's kernels; packs use its `thd` format."""

    def __init__(
        self, config: LayerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **others: Any
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, **others)
        self.mask = attn_mask_type
        self.engine = TEDotProductAttention(
            _without_context_parallel(config),
            layer_number,
            attn_mask_type,
            attention_type,
            softmax_scale=self.softmax_scale,
            cp_comm_type=others.get("cp_comm_type"),
            pg_collection=others.get("pg_collection"),
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Run Transformer Engine's attention, which has its own mask type and scale."""
        if metadata.sample_lengths is None:
            return self.engine(query, key, value, None, self.mask)
        length, batch = query.shape[:2]
        flat = [x.transpose(0, 1).flatten(0, 1).contiguous() for x in (query, key, value)]
        cu_seqlens, max_seqlen = metadata.cu_seqlens, metadata.max_seqlen
        packs = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
        context = self.engine(*flat, None, self.mask, packed_seq_params=packs)
        return context.reshape(batch, length, -1).transpose(0, 1).contiguous()

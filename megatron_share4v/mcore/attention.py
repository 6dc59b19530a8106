"""Core attention on torch's scaled_dot_product_attention: runs on CPU and GPU, without Transformer Engine.

Shapes: q, k, v [S, B, heads, head_dim] with B sequences of S positions; the result is [S, B, heads * head_dim]. A sequence is one sample, or
several of them one after the other (a pack), each of which sees itself alone. Rotary positions (Su et al. 2021) are applied here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_share4v.mcore.cache import CachedStep
from megatron_share4v.ops.rope import rope, rope_table


@dataclass
class Places(PackedSeqParams):
    """What core carries through its layers to our attention. Not in the `thd` format: sequences keep their fixed shape."""

    qkv_format: str = "sbhd"
    table: torch.Tensor | None = None
    """[places, head_dim] fp32, cosines before sines; None: nothing is rotated."""
    positions: torch.Tensor | None = None
    """[S, B] int64, places in the table: of each token in its own sample. None: 0 to S - 1 in each sequence."""
    lengths: tuple[tuple[int, ...], ...] | None = None
    """`Batch.segments`."""


def places(angles: torch.Tensor, *, segments: tuple[tuple[int, ...], ...] | None) -> Places:
    """For sequences of S positions; angles [S, head_dim / 2], `segments` as in Batch."""
    positions = None
    if segments is not None:
        positions = restarting_positions(segments, angles.size(0)).to(angles.device, non_blocking=True)
    return Places(table=rope_table(angles), positions=positions, lengths=segments)


def filled(lengths: Sequence[int], size: int) -> list[int]:
    """The lengths of a pack's samples, with the padding at its end as one more."""
    rest = size - sum(lengths)
    assert rest >= 0, (lengths, size)
    return [*lengths, rest] if rest else list(lengths)


def restarting_positions(segments: Sequence[Sequence[int]], size: int) -> torch.Tensor:
    """[S, B] int64: the position of each token in its own sample."""
    columns = [torch.cat([torch.arange(length) for length in filled(lengths, size)]) for lengths in segments]
    return torch.stack(columns, dim=1)


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
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Places | CachedStep | None = None,
    ) -> torch.Tensor:
        """Causality comes from the layer spec and the ends of samples from `packed_seq_params`, so that no mask is ever materialised."""
        assert attention_mask is None and attention_bias is None, "this attention takes no explicit mask"
        length, batch = query.shape[:2]
        at = packed_seq_params or Places()
        if at.table is not None:
            query, key = rope(query, key=key, table=at.table, positions=at.positions, implementation=self.config.ops)
        if isinstance(at, CachedStep):
            return at.attend(self.layer_number, query, key, value, scale=self.softmax_scale)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if at.lengths is None:
            context = self._attend(query, key, value)
        else:
            context = self._attend_inside(query, key, value, segments=at.lengths)
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[B, heads, S, head_dim] each."""
        grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.softmax_scale, enable_gqa=grouped)

    def _attend_inside(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, segments: tuple[tuple[int, ...], ...]
    ) -> torch.Tensor:
        """One kernel per sample: its cost is that of the sample's own square, and the lengths are known without asking the device."""
        assert len(segments) == query.size(0), (len(segments), query.shape)
        sequences = []
        for row, lengths in enumerate(segments):
            # split, not slices: the gradients of all pieces are joined once, instead of being added into a full-size zero each.
            pieces = [x[row : row + 1].split(filled(lengths, x.size(2)), dim=2) for x in (query, key, value)]
            sequences.append(torch.cat([self._attend(*piece) for piece in zip(*pieces)], dim=2))
        return torch.cat(sequences)

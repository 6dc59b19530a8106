"""Core attention without Transformer Engine: rotary positions (Su et al. 2021), then one of the kernels below, which backends.py picks for a run.

Shapes: q, k, v [S, B, heads, head_dim] with B sequences of S positions; the result is [S, B, heads * head_dim]. A sequence is one sample, or
several of them one after the other (a pack), each of which sees itself alone, by every kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_share4v.mcore.kv_cache import CachedAttentionMetadata
from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.mcore.ulysses import gather_heads_scatter_sequence, scatter_heads_gather_sequence
from megatron_share4v.ops.rope import rope, rope_table
from megatron_share4v.parallel.device import to_device_async


@dataclass
class AttentionMetadata(PackedSeqParams):
    """What core carries through its layers to our attention. Not in the `thd` format: sequences keep their fixed shape."""

    qkv_format: str = "sbhd"
    table: torch.Tensor | None = None
    """[places, head_dim] fp32, cosines before sines; None: nothing is rotated."""
    positions: torch.Tensor | None = None
    """[S, B] int64, places in the table: of each token in its own sample. None: 0 to S - 1 in each sequence."""
    lengths: tuple[tuple[int, ...], ...] | None = None
    """Of the samples of each sequence of a pack, its padding as one more; they add up to S. None: each sequence is one sample."""
    ends: torch.Tensor | None = None
    """[samples + 1] int32: where each sample (and the padding after a pack's last one) ends, sequence after sequence, from 0 on. Only for kernels that want it."""

    @property
    def longest(self) -> int:
        """Positions of the longest of them."""
        assert self.lengths is not None and self.ends is not None
        return max(map(max, self.lengths))


def build_attention_metadata(
    angles: torch.Tensor, *, segments: tuple[tuple[int, ...], ...] | None, kernel: str
) -> AttentionMetadata:
    """For sequences of S positions; angles [S, head_dim / 2], `segments` as in Batch."""
    if segments is None:
        return AttentionMetadata(table=rope_table(angles))
    size, device = angles.size(0), angles.device
    positions = to_device_async(positions_in_samples(segments, size), device)
    whole = tuple(tuple(lengths_with_padding(lengths, size)) for lengths in segments)
    ends = to_device_async(_cu_seqlens(whole), device) if kernel in CU_SEQLENS_KERNELS else None
    return AttentionMetadata(table=rope_table(angles), positions=positions, lengths=whole, ends=ends)


def _cu_seqlens(lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(length for row in lengths for length in row)], dtype=torch.int32)


def lengths_with_padding(lengths: Sequence[int], size: int) -> list[int]:
    """The lengths of a pack's samples, with the padding at its end as one more."""
    rest = size - sum(lengths)
    assert rest >= 0, (lengths, size)
    return [*lengths, rest] if rest else list(lengths)


def positions_in_samples(segments: Sequence[Sequence[int]], size: int) -> torch.Tensor:
    """[S, B] int64: the position of each token in its own sample."""
    columns = [
        torch.cat([torch.arange(length) for length in lengths_with_padding(lengths, size)]) for lengths in segments
    ]
    return torch.stack(columns, dim=1)


class CoreAttention(MegatronModule):
    """Attention of one layer over its own tensor-parallel heads; causal or full, by `attn_mask_type`.

    Under context parallelism a rank comes with its positions of all these heads, and attends for its share of the heads over all positions (ulysses.py):
    rotation, packs and kernels are what they are without.
    """

    def __init__(
        self,
        config: LayerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        assert not config.attention_dropout, "no dropout here"
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask), attn_mask_type
        self.causal = attn_mask_type is AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.kernel = KERNELS.get(config.attention)  # layer_specs_te.py sets another

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: AttentionMetadata | CachedAttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Causality comes from the layer spec and the ends of samples from `packed_seq_params`."""
        assert attention_mask is None and attention_bias is None, "this attention takes no explicit mask"
        at = packed_seq_params or AttentionMetadata()
        if self.cp_group is not None:
            query, key, value = scatter_heads_gather_sequence(query, key, value, group=self.cp_group)
        if at.table is not None:
            query, key = rope(query, key=key, table=at.table, positions=at.positions, implementation=self.config.ops)
        if isinstance(at, CachedAttentionMetadata):
            return at.attend(self.layer_number, query, key, value, scale=self.softmax_scale)
        context = self.kernel(query, key, value, at=at, causal=self.causal, scale=self.softmax_scale)
        return context if self.cp_group is None else gather_heads_scatter_sequence(context, group=self.cp_group)


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    at: AttentionMetadata,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, which never has a mask in memory."""
    length, batch = query.shape[:2]
    heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=query.size(1) != key.size(1)
        )

    context = attend(*heads_first) if at.lengths is None else _attend_sample_by_sample(attend, heads_first, at.lengths)
    return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


def _attend_sample_by_sample(
    attend: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], lengths: tuple[tuple[int, ...], ...]
) -> torch.Tensor:
    """One kernel per sample: its cost is that of the sample's own square, and the lengths are known without asking the device."""
    assert len(lengths) == tensors[0].size(0), (len(lengths), tensors[0].shape)
    sequences = []
    for row, row_lengths in enumerate(lengths):
        # split, not slices: the gradients of all pieces are joined once, instead of being added into a full-size zero each.
        pieces = [x[row : row + 1].split(row_lengths, dim=2) for x in tensors]
        sequences.append(torch.cat([attend(*piece) for piece in zip(*pieces)], dim=2))
    return torch.cat(sequences)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    at: AttentionMetadata,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """torch's kernel for samples of any lengths one after the other, all of them at once. NVIDIA GPUs, bf16."""
    from torch.nn.attention.varlen import varlen_attn  # not in every build of torch

    length, batch = query.shape[:2]
    if at.lengths is None:
        ends, longest = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device), length
    else:
        ends, longest = at.ends, at.longest
    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = (
        {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
    )
    if key.size(2) != query.size(2):
        if "enable_gqa" in known:
            settings["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.size(2) // key.size(2), dim=2) for x in (key, value))
    flat = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]
    context = varlen_attn(*flat, ends, ends, longest, longest, scale=scale, **settings)
    return context.reshape(batch, length, -1).transpose(0, 1).contiguous()


def math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    at: AttentionMetadata,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Products and a softmax in fp32, with the whole square of a sequence in memory: what the others are compared with."""
    length, batch, heads, width = query.shape
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (key, value))
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool)
    if at.lengths is not None:
        owner = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in at.lengths])
        seen = (owner[:, :, None] == owner[:, None, :]).unsqueeze(1)
    seen = to_device_async(seen.tril() if causal else seen, query.device)
    scores = (query @ key.transpose(2, 3)).float() * (width**-0.5 if scale is None else scale)
    context = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(value.dtype) @ value
    return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


KERNELS: dict[str, Callable[..., torch.Tensor]] = {"sdpa": sdpa, "varlen": varlen, "math": math}
CU_SEQLENS_KERNELS = ("varlen", "te")

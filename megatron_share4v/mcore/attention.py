"""Core attention without Transformer Engine: rotary positions (Su et al. 2021), then one of the kernels below.

backends.py selects the kernel of a run. A sequence is one sample, or a pack of several; every kernel keeps the samples
of a pack apart.

S: positions of a sequence; B: sequences; q, k, v [S, B, heads, head_dim] -> [S, B, heads * head_dim].
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
    """Positions and sample boundaries that core passes through its layers to our attention.

    Not in the `thd` format: sequences keep their fixed shape.
    """

    qkv_format: str = "sbhd"
    rope_cache: torch.Tensor | None = None
    """[cached positions, head_dim] fp32, cosines before sines; None: no rotation."""
    positions: torch.Tensor | None = None
    """[S, B] int64 rows of `rope_cache`: the position of each token in its own sample.

    None: 0 to S - 1 in each sequence.
    """
    sample_lengths: tuple[tuple[int, ...], ...] | None = None
    """Sample lengths of each packed sequence, with trailing padding as one more; they add up to S.

    None: one sample per sequence.
    """
    cu_seqlens: torch.Tensor | None = None
    """[samples + 1] int32 cumulative lengths over all sequences, starting at 0.

    Set only for the kernels in CU_SEQLENS_KERNELS.
    """

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sample."""
        assert self.sample_lengths is not None and self.cu_seqlens is not None
        return max(map(max, self.sample_lengths))


def build_attention_metadata(
    angles: torch.Tensor, *, segments: tuple[tuple[int, ...], ...] | None, kernel: str
) -> AttentionMetadata:
    """Build the metadata of sequences of S positions; angles [S, head_dim / 2], `segments` as in Batch."""
    if segments is None:
        return AttentionMetadata(rope_cache=rope_table(angles))
    size, device = angles.size(0), angles.device
    positions = to_device_async(positions_in_samples(segments, size), device)
    padded = tuple(tuple(lengths_with_padding(sample_lengths, size)) for sample_lengths in segments)
    cu_seqlens = to_device_async(_cu_seqlens(padded), device) if kernel in CU_SEQLENS_KERNELS else None
    return AttentionMetadata(
        rope_cache=rope_table(angles), positions=positions, sample_lengths=padded, cu_seqlens=cu_seqlens
    )


def _cu_seqlens(sample_lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(length for row in sample_lengths for length in row)], dtype=torch.int32)


def lengths_with_padding(sample_lengths: Sequence[int], size: int) -> list[int]:
    """Return the sample lengths of a pack, with the padding at its end as one more."""
    rest = size - sum(sample_lengths)
    assert rest >= 0, (sample_lengths, size)
    return [*sample_lengths, rest] if rest else list(sample_lengths)


def positions_in_samples(segments: Sequence[Sequence[int]], size: int) -> torch.Tensor:
    """Return [S, B] int64: the position of each token in its own sample."""
    columns = [
        torch.cat([torch.arange(length) for length in lengths_with_padding(sample_lengths, size)])
        for sample_lengths in segments
    ]
    return torch.stack(columns, dim=1)


class CoreAttention(MegatronModule):
    """Attention of one layer over this rank's heads; causal or full, by `attn_mask_type`.

    Under context parallelism an all-to-all (ulysses.py) exchanges this rank's positions of all its heads for all
    positions of a part of the heads; rotation, packing and kernels stay the same.
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
        assert not config.attention_dropout, "attention dropout is not supported"
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask), attn_mask_type
        self.causal = attn_mask_type is AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

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
        """Attend; the layer spec sets causality, `packed_seq_params` the sample boundaries or the KV cache."""
        assert attention_mask is None and attention_bias is None, "this attention takes no explicit mask"
        metadata = packed_seq_params or AttentionMetadata()
        if self.cp_group is not None:
            query, key, value = scatter_heads_gather_sequence(query, key, value, group=self.cp_group)
        if metadata.rope_cache is not None:
            query, key = rope(
                query,
                key=key,
                table=metadata.rope_cache,
                positions=metadata.positions,
                implementation=self.config.ops,
            )
        if isinstance(metadata, CachedAttentionMetadata):
            return metadata.attend(self.layer_number, query, key, value, scale=self.softmax_scale)
        context = self.attend(query, key, value, metadata=metadata)
        return context if self.cp_group is None else gather_heads_scatter_sequence(context, group=self.cp_group)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Run the kernel that `config.attention` names."""
        kernel = KERNELS[self.config.attention]
        return kernel(query, key, value, metadata=metadata, causal=self.causal, scale=self.softmax_scale)


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attend with torch's scaled_dot_product_attention, without a mask in memory."""
    length, batch = query.shape[:2]
    heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=query.size(1) != key.size(1)
        )

    context = (
        attend(*heads_first)
        if metadata.sample_lengths is None
        else _attend_sample_by_sample(attend, heads_first, metadata.sample_lengths)
    )
    return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


def _attend_sample_by_sample(
    attend: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], sample_lengths: tuple[tuple[int, ...], ...]
) -> torch.Tensor:
    """Run one kernel per sample: cost is quadratic in the sample, not the pack, and lengths need no host sync."""
    assert len(sample_lengths) == tensors[0].size(0), (len(sample_lengths), tensors[0].shape)
    sequences = []
    for row, row_lengths in enumerate(sample_lengths):
        # split, not slices: the gradients of all samples are concatenated once instead of added into full-size zeros.
        samples = [x[row : row + 1].split(row_lengths, dim=2) for x in tensors]
        sequences.append(torch.cat([attend(*sample) for sample in zip(*samples)], dim=2))
    return torch.cat(sequences)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attend to all samples in one call of torch's variable-length kernel. NVIDIA GPUs, bf16."""
    from torch.nn.attention.varlen import varlen_attn  # absent from some builds of torch

    length, batch = query.shape[:2]
    if metadata.cu_seqlens is None:
        max_seqlen = length
        cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    else:
        cu_seqlens, max_seqlen = metadata.cu_seqlens, metadata.max_seqlen
    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = (
        {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
    )
    if key.size(2) != query.size(2):
        if "enable_gqa" in known:
            settings["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.size(2) // key.size(2), dim=2) for x in (key, value))
    query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    context = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, **settings)
    assert isinstance(context, torch.Tensor)
    return context.reshape(batch, length, -1).transpose(0, 1).contiguous()


def math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attend in fp32 with the whole S x S score matrix in memory: the reference for the other kernels."""
    length, batch, heads, width = query.shape
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (key, value))
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool)
    if metadata.sample_lengths is not None:
        owner = torch.stack(
            [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in metadata.sample_lengths]
        )
        seen = (owner[:, :, None] == owner[:, None, :]).unsqueeze(1)
    seen = to_device_async(seen.tril() if causal else seen, query.device)
    scores = (query @ key.transpose(2, 3)).float() * (width**-0.5 if scale is None else scale)
    context = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(value.dtype) @ value
    return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


KERNELS: dict[str, Callable[..., torch.Tensor]] = {"sdpa": sdpa, "varlen": varlen, "math": math}
CU_SEQLENS_KERNELS = ("varlen", "te")

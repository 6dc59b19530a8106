"""Keys and values of what a model has read, kept for the tokens to come; and the attention of a step over them.

A step is a row of T new positions: one or more of each sequence, one sequence after the other. A sequence has its keys and values in consecutive
rows of the cache, so that on a CPU they are read where they lie. On a GPU, where the number of kernels counts for more than the bytes, sequences with
one new position are gathered and attend together. Q heads, G groups of keys and values on this rank, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

_ALIGNED = 16


@dataclass(frozen=True)
class SequenceSpan:
    """A sequence's part of a step: its `count` new positions end at position `end`; position p has its keys and values in row `start` + p."""

    start: int
    count: int
    end: int


class KVCache:
    """[layers, rows, G, D] keys, and as many values, of this tensor rank's heads."""

    def __init__(self, config: TransformerConfig, *, rows: int, device: torch.device) -> None:
        shape = (config.num_layers, rows, _groups_per_rank(config), config.kv_channels)
        self.keys = torch.empty(shape, dtype=config.params_dtype, device=device)
        self.values = torch.empty(shape, dtype=config.params_dtype, device=device)

    @staticmethod
    def bytes_per_row(config: TransformerConfig) -> int:
        """What one position takes on this rank."""
        return 2 * config.num_layers * _groups_per_rank(config) * config.kv_channels * config.params_dtype.itemsize

    def copy(self, source: int, target: int, count: int) -> None:
        """`count` rows from `source` on to those from `target` on; they must not overlap."""
        assert source + count <= target or target + count <= source, (source, target, count)
        for kept in (self.keys, self.values):
            kept[:, target : target + count] = kept[:, source : source + count]


@dataclass
class CachedAttentionMetadata(PackedSeqParams):
    """How core carries the cache and the spans of a step through its layers to ours. Not in the `thd` format: the step is one sequence to core."""

    qkv_format: str = "sbhd"
    cache: KVCache | None = None
    spans: tuple[SequenceSpan, ...] = ()
    table: torch.Tensor | None = None
    """Of rotary positions, as in AttentionMetadata; the model fills it in."""
    gather: bool | None = None
    """Whether sequences with one new position are gathered; None: on a GPU."""

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T, 1]: of each new token in its own sequence."""
        ranges = [torch.arange(span.end - span.count, span.end) for span in self.spans]
        return torch.cat(ranges).unsqueeze(1).to(self.cache.keys.device, non_blocking=True)

    @cached_property
    def rows(self) -> torch.Tensor:
        """[T]: where the new keys and values go."""
        ranges = [torch.arange(span.start + span.end - span.count, span.start + span.end) for span in self.spans]
        return torch.cat(ranges).to(self.cache.keys.device, non_blocking=True)

    @cached_property
    def masks(self) -> tuple[torch.Tensor | None, ...]:
        """For each span [count, end], true where a new position sees an old one; None where nothing is hidden, or torch's own causality does."""
        return tuple(
            None if span.count in (1, span.end) else _causal_mask(span, self.cache.keys.device) for span in self.spans
        )

    @cached_property
    def together(self) -> _DecodeBatch | None:
        """The spans that are gathered; None where none are."""
        if self.gather is False or (self.gather is None and self.cache.keys.device.type == "cpu"):
            return None
        single = [span for span in self.spans if span.count == 1]
        return _DecodeBatch.of(self.spans, device=self.cache.keys.device) if len(single) > 1 else None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """Keep the new keys and values of `layer` (from 1), then [T, 1, Q, D], [T, 1, G, D] twice -> [T, 1, Q * D]."""
        keys, values = self.cache.keys[layer - 1], self.cache.values[layer - 1]
        keys.index_copy_(0, self.rows, key.squeeze(1))
        values.index_copy_(0, self.rows, value.squeeze(1))
        query, results = query.squeeze(1), []
        parts = query.split([span.count for span in self.spans])
        for part, span, mask in zip(parts, self.spans, self.masks):
            if span.count == 1 and self.together is not None:
                results.append(part)  # a place, filled below
                continue
            seen = slice(span.start, span.start + span.end)
            attend = _attend_decode if span.count == 1 else _attend_prefill
            results.append(attend(part, keys[seen], values[seen], mask=mask, scale=scale))
        result = torch.cat(results)
        if self.together is not None:
            result[self.together.places] = self.together.attend(query, keys, values, scale=scale)
        return result.flatten(1).unsqueeze(1)


@dataclass(frozen=True)
class _DecodeBatch:
    """B sequences with one new position each: `places` [B] among the T, `rows` [B, L] of the cache for the longest, `seen` [B, 1, 1, L]."""

    places: torch.Tensor
    rows: torch.Tensor
    seen: torch.Tensor

    @classmethod
    def of(cls, spans: tuple[SequenceSpan, ...], *, device: torch.device) -> _DecodeBatch:
        starts = [sum(span.count for span in spans[:number]) for number in range(len(spans))]
        single = [(at, span) for at, span in zip(starts, spans) if span.count == 1]
        # CUDA's kernels want masks whose rows are aligned.
        longest = -(-max(span.end for _, span in single) // _ALIGNED) * _ALIGNED
        first, end = (
            torch.tensor(numbers).unsqueeze(1)
            for numbers in ([span.start for _, span in single], [span.end for _, span in single])
        )
        position = torch.arange(longest).unsqueeze(0)
        seen = position < end
        rows = torch.where(seen, first + position, first)
        places = torch.tensor([at for at, _ in single])
        return cls(places.to(device), rows.to(device), seen[:, None, None].to(device))

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """[T, Q, D] queries, [rows, G, D] keys and values of the whole cache -> [B, Q, D]."""
        groups, width = keys.shape[1:]
        query = query[self.places].view(len(self.places), groups, -1, width)
        keys, values = (kept[self.rows].transpose(1, 2) for kept in (keys, values))
        result = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.seen, scale=scale)
        return result.reshape(len(self.places), -1, width)


def _attend_decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, mask: None, scale: float | None
) -> torch.Tensor:
    """One position sees everything: the query heads of a group become queries of one head, which spares repeating its keys. [1, Q, D]."""
    groups, width = keys.shape[1:]
    query = query.view(1, groups, -1, width)
    result = F.scaled_dot_product_attention(
        query, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale=scale
    )
    return result.reshape(1, -1, width)


def _attend_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """[count, Q, D] queries, the last of [end, G, D] keys and values -> [count, Q, D]."""
    query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
    grouped = query.size(1) != keys.size(1)
    result = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return result[0].transpose(0, 1)


def _causal_mask(span: SequenceSpan, device: torch.device) -> torch.Tensor:
    """torch's own causal form counts from the first key, ours from the last."""
    return torch.ones(span.count, span.end, dtype=torch.bool, device=device).tril(span.end - span.count)


def _groups_per_rank(config: TransformerConfig) -> int:
    """With fewer groups than ranks, core gives every rank one."""
    return max(1, config.num_query_groups // config.tensor_model_parallel_size)

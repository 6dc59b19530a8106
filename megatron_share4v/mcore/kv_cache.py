"""KV cache, and attention of a prefill or decode step over it.

A step is a row of T new positions: one or more of each sequence, one sequence after the other. The keys and values of a
sequence are in consecutive rows of the cache, so that a CPU reads them in place. On a GPU, where kernel launches cost
more than bytes, the sequences in decode (one new position each) are gathered and attend in one batch.

T: new positions of a step; Q: query heads; G: key/value heads of this rank; D: head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

_ALIGNED = 16


@dataclass(frozen=True)
class SequenceSpan:
    """Part of a step that belongs to one sequence.

    Its `count` new positions end at position `end`; position p has its keys and values in cache row `start` + p.
    """

    start: int
    count: int
    end: int


class KVCache:
    """Keys and values [layers, rows, G, D] of this rank's heads."""

    def __init__(self, config: TransformerConfig, *, rows: int, device: torch.device) -> None:
        shape = (config.num_layers, rows, _groups_per_rank(config), config.kv_channels)
        self.keys = torch.empty(shape, dtype=config.params_dtype, device=device)
        self.values = torch.empty(shape, dtype=config.params_dtype, device=device)

    @staticmethod
    def bytes_per_row(config: TransformerConfig) -> int:
        """Return the bytes that one position takes on this rank."""
        return 2 * config.num_layers * _groups_per_rank(config) * config.kv_channels * config.params_dtype.itemsize

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` rows starting at `source` to the rows starting at `target`; the ranges must not overlap."""
        assert source + count <= target or target + count <= source, (source, target, count)
        for tensor in (self.keys, self.values):
            tensor[:, target : target + count] = tensor[:, source : source + count]


@dataclass
class CachedAttentionMetadata(PackedSeqParams):
    """KV cache and spans of a step, which core passes through its layers to our attention.

    Not in the `thd` format: core sees the step as one sequence.
    """

    qkv_format: str = "sbhd"
    cache: KVCache = field(kw_only=True)
    spans: tuple[SequenceSpan, ...] = ()
    rope_cache: torch.Tensor | None = None
    """Rotary cosines and sines, as in AttentionMetadata; set by the model."""
    gather: bool | None = None
    """Whether sequences in decode are gathered into one batch; None: on a GPU."""

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T, 1] position of each new token in its own sequence."""
        ranges = [torch.arange(span.end - span.count, span.end) for span in self.spans]
        return torch.cat(ranges).unsqueeze(1).to(self.cache.keys.device, non_blocking=True)

    @cached_property
    def rows(self) -> torch.Tensor:
        """[T] cache rows of the new keys and values."""
        ranges = [torch.arange(span.start + span.end - span.count, span.start + span.end) for span in self.spans]
        return torch.cat(ranges).to(self.cache.keys.device, non_blocking=True)

    @cached_property
    def masks(self) -> tuple[torch.Tensor | None, ...]:
        """Boolean mask [count, end] of each span; None where nothing is masked or torch's own causal mask is right."""
        return tuple(
            None if span.count in (1, span.end) else _causal_mask(span, self.cache.keys.device) for span in self.spans
        )

    @cached_property
    def decode_batch(self) -> _DecodeBatch | None:
        """The gathered sequences in decode; None where none are gathered."""
        if self.gather is False or (self.gather is None and self.cache.keys.device.type == "cpu"):
            return None
        single = [span for span in self.spans if span.count == 1]
        return _DecodeBatch.of(self.spans, device=self.cache.keys.device) if len(single) > 1 else None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """Store the new keys and values of `layer` (from 1), then attend.

        query [T, 1, Q, D], key and value [T, 1, G, D] -> [T, 1, Q * D].
        """
        keys, values = self.cache.keys[layer - 1], self.cache.values[layer - 1]
        keys.index_copy_(0, self.rows, key.squeeze(1))
        values.index_copy_(0, self.rows, value.squeeze(1))
        query, results = query.squeeze(1), []
        parts = query.split([span.count for span in self.spans])
        for part, span, mask in zip(parts, self.spans, self.masks):
            if span.count == 1 and self.decode_batch is not None:
                results.append(part)  # placeholder, overwritten below
                continue
            visible = slice(span.start, span.start + span.end)
            attend = _attend_decode if span.count == 1 else _attend_prefill
            results.append(attend(part, keys[visible], values[visible], mask=mask, scale=scale))
        result = torch.cat(results)
        if self.decode_batch is not None:
            result[self.decode_batch.indices] = self.decode_batch.attend(query, keys, values, scale=scale)
        return result.flatten(1).unsqueeze(1)


@dataclass(frozen=True)
class _DecodeBatch:
    """B sequences with one new position each.

    `indices` [B]: indices among the T; `rows` [B, L]: cache rows, L the longest sequence; `visible` [B, 1, 1, L]: mask.
    """

    indices: torch.Tensor
    rows: torch.Tensor
    visible: torch.Tensor

    @classmethod
    def of(cls, spans: tuple[SequenceSpan, ...], *, device: torch.device) -> _DecodeBatch:
        starts = [sum(span.count for span in spans[:number]) for number in range(len(spans))]
        single = [(at, span) for at, span in zip(starts, spans) if span.count == 1]
        # CUDA's kernels need masks with aligned rows.
        longest = -(-max(span.end for _, span in single) // _ALIGNED) * _ALIGNED
        first, end = (
            torch.tensor(numbers).unsqueeze(1)
            for numbers in ([span.start for _, span in single], [span.end for _, span in single])
        )
        position = torch.arange(longest).unsqueeze(0)
        visible = position < end
        rows = torch.where(visible, first + position, first)
        indices = torch.tensor([at for at, _ in single])
        return cls(indices.to(device), rows.to(device), visible[:, None, None].to(device))

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """Attend with [T, Q, D] queries over the whole cache [rows, G, D] -> [B, Q, D]."""
        groups, width = keys.shape[1:]
        query = query[self.indices].view(len(self.indices), groups, -1, width)
        keys, values = (tensor[self.rows].transpose(1, 2) for tensor in (keys, values))
        result = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.visible, scale=scale)
        return result.reshape(len(self.indices), -1, width)


def _attend_decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Attend from one position to all cached ones -> [1, Q, D].

    The query heads of a group become queries of one head, which avoids repeating its keys.
    """
    groups, width = keys.shape[1:]
    query = query.view(1, groups, -1, width)
    result = F.scaled_dot_product_attention(
        query, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale=scale
    )
    return result.reshape(1, -1, width)


def _attend_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Attend from [count, Q, D] queries to [end, G, D] keys and values -> [count, Q, D].

    The queries are those of the last `count` keys.
    """
    query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
    grouped = query.size(1) != keys.size(1)
    result = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return result[0].transpose(0, 1)


def _causal_mask(span: SequenceSpan, device: torch.device) -> torch.Tensor:
    """Causal mask aligned with the last key; torch's own is aligned with the first."""
    return torch.ones(span.count, span.end, dtype=torch.bool, device=device).tril(span.end - span.count)


def _groups_per_rank(config: TransformerConfig) -> int:
    """Key/value heads per TP rank; with fewer heads than ranks, core gives every rank one."""
    return max(1, config.num_query_groups // config.tensor_model_parallel_size)

"""Attention over the KV cache: prefill and decode in pieces equal attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from tiny import tiny_model
from tolerances import FP32_MODULE

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.attention import CoreAttention
from megatron_share4v.mcore.kv_cache import CachedAttentionMetadata, KVCache, SequenceSpan
from megatron_share4v.mcore.layer_config import language_config

CONFIG = language_config(
    tiny_model(), parallel=ParallelConfig(), dtype=torch.float32, ops="reference", layers_per_stage=(8,)
)
HEADS, GROUPS, WIDTH = 4, 2, 8
LAYER = 3


def attention() -> CoreAttention:
    return CoreAttention(CONFIG, LAYER, AttnMaskType.causal, "self")


def sequence(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, 1, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("cuts", [(11,), (1,) * 11, (4, 1, 6), (8, 1, 1, 1)], ids=str)
def test_chunked_attention_equals_whole_sequences(cuts: tuple[int, ...], gather: bool) -> None:
    cache = KVCache(CONFIG, rows=40, device=torch.device("cpu"))
    whole, other = sequence(11, 1), sequence(11, 2)
    expected = [attention()(*tensors) for tensors in (whole, other)]
    found, at = [[], []], 0
    for count in cuts:
        spans = (
            SequenceSpan(start=20, count=count, end=at + count),
            SequenceSpan(start=3, count=count, end=at + count),
        )
        piece = [torch.cat([a[at : at + count], b[at : at + count]]) for a, b in zip(whole, other)]
        result = attention()(*piece, packed_seq_params=CachedAttentionMetadata(cache=cache, spans=spans, gather=gather))
        for kept, part in zip(found, result.split(count)):
            kept.append(part)
        at += count
    for parts, reference in zip(found, expected):
        assert (torch.cat(parts) - reference).abs().max() <= FP32_MODULE * reference.abs().max()


def test_batched_decode_leaves_prefill_unchanged() -> None:
    cache = KVCache(CONFIG, rows=60, device=torch.device("cpu"))
    lengths, counts, starts = (4, 9, 7, 2), (1, 3, 1, 1), (0, 10, 25, 40)
    tensors = [sequence(length, seed) for seed, length in enumerate(lengths)]
    cache.keys.fill_(torch.nan)
    cache.values.zero_()
    for (query, key, value), length, count, start in zip(tensors, lengths, counts, starts):
        if length > count:
            before = [x[: length - count] for x in (query, key, value)]
            attention()(
                *before,
                packed_seq_params=CachedAttentionMetadata(
                    cache=cache, spans=(SequenceSpan(start, length - count, length - count),)
                ),
            )
    spans = tuple(SequenceSpan(start, count, length) for start, count, length in zip(starts, counts, lengths))
    new = [torch.cat([parts[which][-count:] for parts, count in zip(tensors, counts)]) for which in range(3)]
    result = attention()(*new, packed_seq_params=CachedAttentionMetadata(cache=cache, spans=spans, gather=True))
    expected = torch.cat([attention()(*parts)[-count:] for parts, count in zip(tensors, counts)])
    assert (result - expected).abs().max() <= FP32_MODULE * expected.abs().max()


def test_copied_prefix_works_for_another_sequence() -> None:
    cache = KVCache(CONFIG, rows=40, device=torch.device("cpu"))
    tensors = sequence(9, 1)
    attention()(
        *(x[:6] for x in tensors),
        packed_seq_params=CachedAttentionMetadata(cache=cache, spans=(SequenceSpan(0, 6, 6),)),
    )
    cache.copy(0, 30, 6)
    cache.keys[:, :6] = torch.nan
    result = attention()(
        *(x[6:] for x in tensors),
        packed_seq_params=CachedAttentionMetadata(cache=cache, spans=(SequenceSpan(30, 3, 9),)),
    )
    reference = attention()(*tensors)[6:]
    assert (result - reference).abs().max() <= FP32_MODULE * reference.abs().max()


def test_positions_and_rows_of_a_step() -> None:
    cache = KVCache(CONFIG, rows=40, device=torch.device("cpu"))
    step = CachedAttentionMetadata(cache=cache, spans=(SequenceSpan(10, 2, 5), SequenceSpan(0, 1, 1)))
    assert step.positions.squeeze(1).tolist() == [3, 4, 0] and step.rows.tolist() == [13, 14, 0]
    assert KVCache.bytes_per_row(CONFIG) == 2 * 8 * GROUPS * WIDTH * 4 == cache.keys.nbytes * 2 // 40

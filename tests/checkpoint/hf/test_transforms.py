"""Transforms: bitwise inverses in both directions for many shapes, and the row order that tensor parallelism needs."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_share4v.checkpoint.hf.transforms import (
    ConcatRows,
    Identity,
    InterleaveQKV,
    PadVocabulary,
    SqueezeLeading,
    Transform,
)


def _cases() -> list[tuple[Transform, list[tuple[int, ...]]]]:
    draw = random.Random(0)
    cases: list[tuple[Transform, list[tuple[int, ...]]]] = [(Identity(), [(3, 5, 2, 2)]), (Identity(), [(7,)])]
    cases += [(SqueezeLeading(2), [(1, 1, 7)]), (SqueezeLeading(1), [(1, 3, 5)])]
    for _ in range(20):
        groups, queries, head = draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 4, 7]), draw.choice([1, 4, 6])
        tail = draw.choice([(), (draw.randint(1, 9),)])
        rows = groups * head
        cases.append((InterleaveQKV(groups, queries, head), [(rows * queries, *tail), (rows, *tail), (rows, *tail)]))
        cases.append((ConcatRows(), [(draw.randint(1, 9), 5)] * 2))
        vocabulary = draw.randint(1, 40)
        cases.append((PadVocabulary(vocabulary, -(-vocabulary // 16) * 16), [(vocabulary, draw.randint(1, 6))]))
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("transform", "shapes"), _cases())
def test_a_transform_and_its_inverse_are_bitwise_equal(
    transform: Transform, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    parts = [torch.randn(shape).to(dtype) for shape in shapes]
    megatron = transform.to_megatron(parts)
    assert megatron.dtype == dtype
    back = transform.to_hf(megatron)
    assert len(back) == len(parts)
    assert all(torch.equal(there, here) for there, here in zip(back, parts))
    assert torch.equal(transform.to_megatron(back), megatron)


def test_a_group_of_heads_stays_together() -> None:
    # Row names: component, group, index in the group. Two query heads per key/value head, one row per head.
    query, key, value = (
        torch.tensor([[100, 101, 110, 111]]).T,
        torch.tensor([[200, 210]]).T,
        torch.tensor([[300, 310]]).T,
    )
    fused = InterleaveQKV(groups=2, queries_per_group=2, head_dim=1).to_megatron([query, key, value])
    assert fused.flatten().tolist() == [100, 101, 200, 300, 110, 111, 210, 310]


def test_padding_is_zero() -> None:
    padded = PadVocabulary(rows=3, padded=8).to_megatron([torch.ones(3, 2)])
    assert padded.shape == (8, 2) and padded[3:].abs().sum() == 0 and padded.sum() == 6

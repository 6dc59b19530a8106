"""Packed attention: each sample sees itself alone, exactly as it would without neighbours."""

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_share4v.mcore.attention import Places, ScaledDotProductAttention, restarting_positions

SEGMENTS = ((5, 1, 3), (12,))  # the first sequence has three positions of padding


def _attention() -> ScaledDotProductAttention:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0)
    return ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self")


def _inputs(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 2, heads, 4, generator=generator) for heads in (4, 2, 2)]


def test_equals_each_sample_alone():
    attention, (query, key, value) = _attention(), _inputs(0)
    packed = attention(query, key, value, packed_seq_params=Places(lengths=SEGMENTS))
    assert packed.shape == (12, 2, 16)
    for sequence, start, end in ((0, 0, 5), (0, 5, 6), (0, 6, 9), (1, 0, 12)):
        piece = [x[start:end, sequence : sequence + 1] for x in (query, key, value)]
        torch.testing.assert_close(packed[start:end, sequence], attention(*piece)[:, 0], rtol=0, atol=1e-6)


def test_equals_an_explicit_block_mask():
    attention, tensors = _attention(), [x.requires_grad_() for x in _inputs(1)]
    owner = torch.tensor([0] * 5 + [1] + [2] * 3 + [3] * 3)
    mask = (owner[:, None] == owner) & torch.ones(12, 12, dtype=torch.bool).tril()
    packed = attention(*tensors, packed_seq_params=Places(lengths=SEGMENTS))[:, 0]
    q, k, v = (x[:, 0].transpose(0, 1) for x in tensors)
    scores = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(2, 0)) / 2.0
    expected = torch.einsum("hqk,hkd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v.repeat_interleave(2, 0)).reshape(12, 16)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-6)
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((packed * weight).sum(), tensors, retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), tensors)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [slice(0, 5), slice(5, 6), slice(6, 9), slice(9, 12)])
def test_a_changed_sample_changes_itself_alone(changed: slice):
    attention, tensors = _attention(), _inputs(3)
    before = attention(*tensors, packed_seq_params=Places(lengths=SEGMENTS))
    for tensor in tensors:
        tensor[changed, 0] += 1.0
    after = attention(*tensors, packed_seq_params=Places(lengths=SEGMENTS))
    moved = (before != after).any(dim=2)
    others = torch.ones(12, dtype=torch.bool)
    others[changed] = False
    assert not moved[others, 0].any() and not moved[:, 1].any() and moved[changed, 0].any()


def test_positions_restart():
    assert restarting_positions(SEGMENTS, 12).T.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 0, 1, 2], list(range(12))]

"""Packed attention: each sample attends to itself only, as it would alone."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.errors import OpsError
from megatron_share4v.mcore import backends
from megatron_share4v.mcore.attention import (
    KERNELS,
    AttentionMetadata,
    CoreAttention,
    build_attention_metadata,
    positions_in_samples,
)
from megatron_share4v.mcore.backends import choose_attention_backend
from megatron_share4v.mcore.layer_config import LayerConfig

SEGMENTS = ((5, 1, 3, 3), (12,))  # the first sequence has three positions of padding
kernels = pytest.mark.parametrize(
    "kernel", [name for name in KERNELS if name != "varlen"]
)  # varlen needs a GPU: tests/gpu


def _attention(kernel: str = "sdpa", mask: AttnMaskType = AttnMaskType.causal) -> CoreAttention:
    config = LayerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, attention=kernel
    )
    return CoreAttention(config, 1, mask, "self")


def _inputs(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 2, heads, 4, generator=generator) for heads in (4, 2, 2)]


@kernels
def test_equals_each_sample_alone(kernel: str):
    attention, (query, key, value) = _attention(kernel), _inputs(0)
    packed = attention(query, key, value, packed_seq_params=AttentionMetadata(sample_lengths=SEGMENTS))
    assert packed.shape == (12, 2, 16)
    for sequence, start, end in ((0, 0, 5), (0, 5, 6), (0, 6, 9), (1, 0, 12)):
        piece = [x[start:end, sequence : sequence + 1] for x in (query, key, value)]
        torch.testing.assert_close(packed[start:end, sequence], attention(*piece)[:, 0], rtol=0, atol=1e-6)


@kernels
def test_equals_an_explicit_block_mask(kernel: str):
    attention, tensors = _attention(kernel), [x.requires_grad_() for x in _inputs(1)]
    owner = torch.tensor([0] * 5 + [1] + [2] * 3 + [3] * 3)
    mask = (owner[:, None] == owner) & torch.ones(12, 12, dtype=torch.bool).tril()
    packed = attention(*tensors, packed_seq_params=AttentionMetadata(sample_lengths=SEGMENTS))[:, 0]
    q, k, v = (x[:, 0].transpose(0, 1) for x in tensors)
    scores = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(2, 0)) / 2.0
    expected = torch.einsum(
        "hqk,hkd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v.repeat_interleave(2, 0)
    ).reshape(12, 16)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-6)
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad((packed * weight).sum(), tensors, retain_graph=True)
    reference = torch.autograd.grad((expected * weight).sum(), tensors)
    for a, b in zip(actual, reference):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@kernels
@pytest.mark.parametrize("changed", [slice(0, 5), slice(5, 6), slice(6, 9), slice(9, 12)])
def test_changing_a_sample_changes_no_other(changed: slice, kernel: str):
    attention, tensors = _attention(kernel), _inputs(3)
    before = attention(*tensors, packed_seq_params=AttentionMetadata(sample_lengths=SEGMENTS))
    for tensor in tensors:
        tensor[changed, 0] += 1.0
    after = attention(*tensors, packed_seq_params=AttentionMetadata(sample_lengths=SEGMENTS))
    moved = (before != after).any(dim=2)
    others = torch.ones(12, dtype=torch.bool)
    others[changed] = False
    assert not moved[others, 0].any() and not moved[:, 1].any() and moved[changed, 0].any()


def test_positions_restart():
    assert positions_in_samples(((5, 1, 3), (12,)), 12).T.tolist() == [
        [0, 1, 2, 3, 4, 0, 0, 1, 2, 0, 1, 2],
        list(range(12)),
    ]


@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
@pytest.mark.parametrize("lengths", [None, SEGMENTS])
def test_kernels_are_equal(mask: AttnMaskType, lengths: tuple[tuple[int, ...], ...] | None):
    tensors, weight = (
        [x.requires_grad_() for x in _inputs(4)],
        torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(5)),
    )
    results = []
    for kernel in ("math", "sdpa"):
        context = _attention(kernel, mask)(*tensors, packed_seq_params=AttentionMetadata(sample_lengths=lengths))
        results.append((context, *torch.autograd.grad((context * weight).sum(), tensors)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_cumulative_sample_lengths():
    angles = torch.zeros(12, 2)
    metadata = build_attention_metadata(angles, segments=((5, 1, 3), (12,)), kernel="varlen")
    assert (
        metadata.sample_lengths == SEGMENTS
        and metadata.cu_seqlens.tolist() == [0, 5, 6, 9, 12, 24]
        and metadata.cu_seqlens.dtype == torch.int32
        and metadata.max_seqlen == 12
    )
    assert build_attention_metadata(angles, segments=((5, 1, 3), (12,)), kernel="sdpa").cu_seqlens is None
    assert build_attention_metadata(angles, segments=None, kernel="varlen").sample_lengths is None


def test_backend_choice_and_errors(monkeypatch: pytest.MonkeyPatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    fp32, bf16 = {"packed": True, "dtype": torch.float32}, {"packed": True, "dtype": torch.bfloat16}
    assert (
        choose_attention_backend("auto", device=cpu, packed=False, dtype=torch.float32).line
        == "attention: sdpa (samples are not packed)"
    )
    chosen = choose_attention_backend("auto", device=cpu, **bf16)
    assert chosen.implementation == "sdpa" and "for NVIDIA GPUs only" in chosen.reason
    assert choose_attention_backend("math", device=cpu, **fp32).implementation == "math"
    for name, what in (("varlen", "for NVIDIA GPUs only"), ("te", "built without CUDA; install it")):
        with pytest.raises(OpsError, match=f"attention: {name} was requested on cpu: .*{what}"):
            choose_attention_backend(name, device=cpu, **bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "te_unavailable_reason", lambda: None)
    assert choose_attention_backend("auto", device=gpu, **bf16).implementation == "varlen"
    assert choose_attention_backend("auto", device=gpu, **fp32).implementation == "sdpa"
    assert choose_attention_backend("te", device=gpu, **bf16).implementation == "te"
    for name, what in (("varlen", "for bf16 only"), ("te", "keep packed samples apart")):
        with pytest.raises(OpsError, match=what):
            choose_attention_backend(name, device=gpu, **fp32)

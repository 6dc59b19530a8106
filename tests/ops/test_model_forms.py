"""Ops against other formulas than their references, from torch and from the data path."""

from __future__ import annotations

import pytest
import torch

from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.pixels import normalise, normalised_values
from megatron_share4v.ops.image_merge import image_merge
from megatron_share4v.ops.norm import add_rms_norm, layer_norm, rms_norm
from megatron_share4v.ops.op import Implementation
from megatron_share4v.ops.patchify import patchify
from tools.op_cases.record import draw

implementations = pytest.mark.parametrize("implementation", ["native", "reference"])


@pytest.fixture(autouse=True)
def native(native_ops: None) -> None:
    """Load the native ops: both implementations are available."""


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(28, 42), (34, 55)], ids=["whole", "remainder"])
def test_patches_times_weight_are_the_convolution(
    implementation: Implementation, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels_in_order = normalise(pixels, dtype=dtype, vision=VisionConfig())
    table = normalised_values(VisionConfig(), device=pixels.device, dtype=dtype)
    patches = patchify(pixels, table=table, patch=14, implementation=implementation)
    unfolded = torch.nn.functional.unfold(pixels_in_order, 14, stride=14).transpose(1, 2)
    assert torch.equal(patches, unfolded)
    convolution = torch.nn.Conv2d(3, 8, 14, stride=14, bias=False, dtype=torch.float64)
    expected = convolution(pixels_in_order.double()).flatten(2).transpose(1, 2)
    # The product in fp64: only the order of elements is compared.
    torch.testing.assert_close(patches.double() @ convolution.weight.flatten(1).t(), expected, rtol=1e-12, atol=1e-12)


@implementations
def test_norms_are_those_of_torch(implementation: Implementation) -> None:
    x, weight, bias = (
        draw((5, 7, 48), dtype=torch.float32),
        draw((48,), dtype=torch.float32, seed=1),
        draw((48,), dtype=torch.float32, seed=2),
    )
    # Sums of 48 terms in fp32, in another order.
    close = {"rtol": 1e-5, "atol": 1e-6}
    expected = torch.nn.functional.rms_norm(x, (48,), weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight=weight, eps=1e-5, implementation=implementation), expected, **close)
    normed, total = add_rms_norm(
        x - 1, residual=torch.ones_like(x), weight=weight, eps=1e-5, implementation=implementation
    )
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (48,), weight, 1e-5), **close)
    assert torch.equal(total, (x - 1) + 1)
    expected = torch.nn.functional.layer_norm(x, (48,), weight, bias, 1e-5)
    torch.testing.assert_close(
        layer_norm(x, weight=weight, bias=bias, eps=1e-5, implementation=implementation), expected, **close
    )


@implementations
@pytest.mark.parametrize("frozen", ["tokens", "features"])
def test_merge_gradients_only_where_required(implementation: Implementation, frozen: str) -> None:
    slots = torch.tensor([4, 1])
    tokens, features = (
        draw((rows, 8), dtype=torch.float32).requires_grad_(name != frozen)
        for name, rows in (("tokens", 6), ("features", 2))
    )
    merged = image_merge(tokens, features=features, slots=slots, implementation=implementation)
    merged.backward(torch.ones_like(merged))
    expected = {"tokens": torch.tensor([1.0, 0, 1, 1, 0, 1]), "features": torch.ones(2)}
    for name, leaf in (("tokens", tokens), ("features", features)):
        assert (
            leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[name].unsqueeze(1).expand(-1, 8))
        )


def test_last_feature_of_a_duplicate_slot_wins() -> None:
    features = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    merged = image_merge(torch.zeros(4, 1), features=features, slots=torch.tensor([2, 0, 2]), implementation="native")
    assert merged.flatten().tolist() == [2, 0, 3, 0]
    merged.sum().backward()
    assert features.grad.flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("slot", [-1, 6])
def test_slot_out_of_range_raises(slot: int) -> None:
    with pytest.raises(RuntimeError, match="index outside its range"):
        image_merge(torch.zeros(6, 2), features=torch.ones(1, 2), slots=torch.tensor([slot]), implementation="native")


def test_mismatched_arguments_raise_with_names() -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(RuntimeError, match=r"weight is Float \[7\], which does not fit Float \[4, 8\]"):
        rms_norm(x, weight=torch.ones(7), eps=0.0, implementation="native")
    with pytest.raises(RuntimeError, match=r"weight is BFloat16 \[8\]"):
        rms_norm(x, weight=torch.ones(8, dtype=torch.bfloat16), eps=0.0, implementation="native")
    with pytest.raises(RuntimeError, match=r"float32 and bfloat16, got Double"):
        rms_norm(x.double(), weight=torch.ones(8).double(), eps=0.0, implementation="native")
    with pytest.raises(RuntimeError, match=r"at least the patch's, got Byte \[1, 3, 8, 3\] and patch 4"):
        patchify(
            torch.zeros(1, 3, 8, 3, dtype=torch.uint8), table=torch.zeros(3, 256), patch=4, implementation="native"
        )


def test_compiled_model_code_keeps_the_ops() -> None:
    def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight=weight, eps=1e-5, implementation="native").sin()

    x, weight = draw((6, 32), dtype=torch.float32).requires_grad_(), torch.ones(32, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x, weight).sum(), (x, weight)),
        torch.autograd.grad(block(x, weight).sum(), (x, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)

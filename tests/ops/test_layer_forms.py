"""Activations and rotary positions against those of megatron-core's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_share4v.mcore.attention import positions_in_samples
from megatron_share4v.ops.activation import bias_gelu, bias_gelu_tanh, bias_quick_gelu, bias_swiglu
from megatron_share4v.ops.op import Implementation
from megatron_share4v.ops.rope import rope, rope_table
from tools.op_cases.record import draw

implementations = pytest.mark.parametrize("implementation", ["native", "reference"])


@pytest.fixture(autouse=True)
def native(native_ops: None) -> None:
    """Load the native ops: both implementations are available."""


@implementations
def test_activations_equal_those_of_core_layers(implementation: Implementation) -> None:
    x, bias = 3 * draw((4, 3, 48), dtype=torch.float32), draw((48,), dtype=torch.float32, seed=1)
    # Another formula of one activation, in fp32.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(bias_gelu(x, bias=bias, implementation=implementation), F.gelu(x + bias), **close)
    torch.testing.assert_close(
        bias_gelu_tanh(x, bias=bias, implementation=implementation), F.gelu(x + bias, approximate="tanh"), **close
    )
    torch.testing.assert_close(
        bias_quick_gelu(x, bias=bias, implementation=implementation),
        (x + bias) * torch.sigmoid(1.702 * (x + bias)),
        **close,
    )
    # As in core's MLP: `torch.chunk` of fc1's output, the activation on the first half.
    first, second = torch.chunk(x + bias, 2, dim=-1)
    torch.testing.assert_close(
        bias_swiglu(x, bias=bias, implementation=implementation), F.silu(first) * second, **close
    )
    first, second = torch.chunk(x, 2, dim=-1)
    torch.testing.assert_close(bias_swiglu(x, implementation=implementation), F.silu(first) * second, **close)


def test_gelu_is_precise_in_the_tail() -> None:
    x = torch.linspace(-12, -2, 101)
    truth = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    # x^2 / 2 is rounded before the exponential: 72 * 2**-24 at x = -12.
    torch.testing.assert_close(bias_gelu(x, implementation="native").double(), truth, rtol=1e-5, atol=0)


def test_non_finite_values_are_not_hidden() -> None:
    x = torch.tensor([[float("nan"), 1.0, 2.0, 3.0]])
    for function in (bias_gelu, bias_gelu_tanh, bias_quick_gelu, bias_swiglu):
        assert (
            function(x, implementation="native").isnan().flatten().tolist()
            == function(x, implementation="reference").isnan().flatten().tolist()
        )


def test_swiglu_rejects_odd_widths() -> None:
    with pytest.raises(RuntimeError, match=r"as many gates as values, got Float \[2, 7\]"):
        bias_swiglu(torch.zeros(2, 7), implementation="native")


def rotated_by_core(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[S, B, heads, D] by [S, 1 or B, 1, D]; imported here, after megatron_share4v.mcore has patched torch.cuda."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    return _apply_rotary_pos_emb_bshd(x, angles)


@implementations
@pytest.mark.parametrize("segments", [None, ((5, 6), (9,), (3, 3, 3))], ids=["whole", "packed"])
def test_rotation_is_that_of_core(implementation: Implementation, segments: tuple[tuple[int, ...], ...] | None) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    length, batch, width = 11, 3, 16
    angles = RotaryEmbedding(kv_channels=width, rotary_percent=1.0, rotary_base=10000, use_cpu_initialization=True)(
        length
    )  # [S, 1, 1, D]
    positions = None if segments is None else positions_in_samples(segments, length)
    leaves = [draw((length, batch, heads, width), dtype=torch.float32, seed=heads).requires_grad_() for heads in (4, 2)]
    slopes = [draw(tuple(leaf.shape), dtype=torch.float32, seed=9) for leaf in leaves]
    table = rope_table(angles[:, 0, 0, : width // 2])
    actual = rope(leaves[0], key=leaves[1], table=table, positions=positions, implementation=implementation)
    core = [rotated_by_core(leaf, angles if positions is None else angles[:, 0][positions]) for leaf in leaves]
    for got, expected in zip(
        (*actual, *torch.autograd.grad(actual, leaves, slopes)),
        (*core, *torch.autograd.grad(core, leaves, slopes)),
        strict=True,
    ):
        # A fused multiply-add rounds once less.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_rotation_back_gives_the_input() -> None:
    query, key = (draw((6, 2, heads, 8), dtype=torch.float32, seed=heads) for heads in (3, 1))
    table = rope_table(draw((6, 4), dtype=torch.float32))
    there = torch.ops.share4v.rope(query, key, table, None, False)
    back = torch.ops.share4v.rope(*there, table, None, True)
    torch.testing.assert_close(back, (query, key), rtol=0, atol=1e-6)


def test_positions_outside_the_table_raise() -> None:
    query, table = torch.zeros(3, 1, 2, 4), torch.zeros(3, 4)
    for outside in (-1, 3):
        with pytest.raises(RuntimeError, match="index outside its range"):
            rope(query, key=query, table=table, positions=torch.tensor([[0], [outside], [1]]), implementation="native")
    with pytest.raises(RuntimeError, match=r"a place in the table for each of S, got Float \[2, 4\]"):
        rope(query, key=query, table=table[:2], implementation="native")
    with pytest.raises(RuntimeError, match=r"even D, got Float \[3, 1, 2, 3\]"):
        rope(query[..., :3], key=query[..., :3], table=table[:, :3], implementation="native")

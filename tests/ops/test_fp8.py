"""FP8 formats against torch's own, and the linear layer against fp32 and bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_share4v.errors import OpsError
from megatron_share4v.ops import fp8_linear as module
from megatron_share4v.ops.fp8 import DTYPES, Format, fp8_cast, fp8_cast_both, fp8_cast_transposed, fp8_scale
from megatron_share4v.ops.fp8_linear import Fp8Linear, fp8_linear, require_fp8
from megatron_share4v.ops.op import Implementation
from tools.op_cases.record import draw

formats = pytest.mark.parametrize("format", DTYPES)
implementations = pytest.mark.parametrize("implementation", ["native", "reference"])
ROUNDING = {"e4m3": 2**-4, "e5m2": 2**-3}
"""Largest relative error of one number: half an ulp of 3, or 2, mantissa bits."""


@pytest.fixture(autouse=True)
def native(native_ops: None) -> None:
    """Load the native ops: both implementations are available."""


@formats
def test_every_fp8_code_round_trips(format: Format) -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = codes.view(DTYPES[format]).float()
    finite = values.isfinite()
    got = fp8_cast(values.unsqueeze(0), scale=torch.tensor(1.0), format=format, implementation="native")[0]
    assert torch.equal(got.view(torch.uint8)[finite], codes[finite])
    assert got.float()[~finite].isnan().all()


@formats
def test_ties_round_to_even(format: Format) -> None:
    codes = torch.arange(0, 0x7B, dtype=torch.uint8)
    values = codes.view(DTYPES[format]).double()
    midway = ((values[:-1] + values[1:]) / 2).float().unsqueeze(0)
    got = fp8_cast(midway, scale=torch.tensor(1.0), format=format, implementation="native")[0].view(torch.uint8)
    assert torch.equal(got, codes[:-1] + codes[:-1] % 2)


@formats
@implementations
def test_scaled_numbers_are_near(format: Format, implementation: Implementation) -> None:
    x = 1000 * draw((37, 48), dtype=torch.bfloat16)
    scale = fp8_scale(x, format=format, implementation=implementation)
    straight, across = fp8_cast_both(x, scale=scale, format=format, implementation=implementation)
    assert straight.dtype == across.dtype == DTYPES[format] and across.shape == (48, 48)
    assert straight.float().abs().max() == torch.finfo(DTYPES[format]).max
    error, large = (straight.float() * scale - x.float()).abs(), x.abs() > x.abs().max() * 2**-12
    assert (error[large] <= 1.0001 * ROUNDING[format] * x.float().abs()[large]).all()
    assert torch.equal(across.float()[:, :37], straight.float().t()) and not across.float()[:, 37:].any()
    only = fp8_cast_transposed(x, scale=scale, format=format, implementation=implementation)
    assert torch.equal(only.view(torch.uint8), across.view(torch.uint8))


@formats
@implementations
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_not_hidden(format: Format, implementation: Implementation, bad: float) -> None:
    x = draw((16, 32), dtype=torch.float32)
    x[3, 5] = bad
    scale = fp8_scale(x, format=format, implementation=implementation)
    assert not scale.isfinite()
    assert (fp8_cast(x, scale=scale, format=format, implementation=implementation).float() * scale).isnan().all()
    # With a scale from elsewhere: only this number.
    codes = fp8_cast(x, scale=torch.tensor(1.0), format=format, implementation=implementation).float()
    assert codes[3, 5].isnan() and codes.isnan().sum() == 1
    y = fp8_linear(x, weight=draw((16, 32), dtype=torch.float32), implementation=implementation)
    assert y.isnan().all()


def test_zeros_have_a_scale() -> None:
    weight = draw((16, 32), dtype=torch.float32).requires_grad_()
    y = fp8_linear(torch.zeros(4, 32), weight=weight, implementation="native")
    assert not y.any()
    y.backward(torch.ones_like(y))
    assert not weight.grad.any()


def test_casts_saturate() -> None:
    x = torch.tensor([[449.0, 1e30, -1e30, 464.0]])
    got = fp8_cast(x, scale=torch.tensor(1.0), format="e4m3", implementation="native").float()
    assert got.tolist() == [[448, 448, -448, 448]]


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precise", [False, True])
def test_layer_is_near_the_one_in_full_precision(
    implementation: Implementation, dtype: torch.dtype, precise: bool
) -> None:
    # 5 x 7 rows: not a multiple of 16.
    x, weight, bias = (
        draw((5, 7, 64), dtype=dtype),
        draw((48, 64), dtype=dtype, seed=1),
        draw((48,), dtype=dtype, seed=2),
    )
    slope = draw((5, 7, 48), dtype=dtype, seed=3)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    got = fp8_linear(x, weight=weight, bias=bias, precise_weight_grad=precise, implementation=implementation)
    grads = torch.autograd.grad(got, leaves, slope)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = F.linear(*wide)
    truths = torch.autograd.grad(truth, wide, slope.double())
    assert got.dtype == dtype and [grad.dtype for grad in grads] == [dtype] * 3
    # Uniform rounding errors of 3 bits: 2**-4 / sqrt(3) = 3.6 % at most, half of it on average, of two factors; 2 bits
    # double one of them.
    assert 0.005 < relative(got, truth) < 0.05
    assert 0.01 < relative(grads[0], truths[0]) < 0.08
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    assert relative(grads[1], truths[1]) < rounding if precise else 0.01 < relative(grads[1], truths[1]) < 0.08
    # The bias is not in FP8; sums of 35 rows.
    assert relative(grads[2], truths[2]) < rounding


def test_layer_computes_the_product_of_its_codes() -> None:
    x, weight, slope = (
        draw(shape, dtype=torch.float32, seed=seed).requires_grad_()
        for seed, shape in enumerate(((24, 32), (16, 32), (24, 16)))
    )
    y = fp8_linear(x, weight=weight, implementation="native")
    grads = torch.autograd.grad(y, (x, weight), slope)

    def seen(tensor: torch.Tensor, format: Format) -> torch.Tensor:
        scale = fp8_scale(tensor, format=format, implementation="reference")
        return fp8_cast(tensor, scale=scale, format=format, implementation="reference").double() * scale.double()

    wide_x, wide_weight, wide_slope = (
        seen(x.detach(), "e4m3"),
        seen(weight.detach(), "e4m3"),
        seen(slope.detach(), "e5m2"),
    )
    # Sums of 32 products in fp32.
    for got, truth in zip(
        (y, *grads), (wide_x @ wide_weight.t(), wide_slope @ wide_weight, wide_slope.t() @ wide_x), strict=True
    ):
        assert relative(got, truth) < 1e-6


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("precise", [False, True])
def test_gradients_only_where_required(frozen: str, precise: bool) -> None:
    x, weight = (
        draw(shape, dtype=torch.float32).requires_grad_(name != frozen)
        for name, shape in (("x", (3, 16)), ("weight", (32, 16)))
    )
    fp8_linear(x, weight=weight, precise_weight_grad=precise, implementation="native").sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_zero_rows_are_allowed() -> None:
    layer = Fp8Linear(16, 32, implementation="native")
    x = torch.zeros(2, 0, 16, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, 32)
    y.sum().backward()
    assert x.grad.shape == x.shape and not layer.weight.grad.any()


def test_layer_learns_and_keeps_the_parameters_of_linear() -> None:
    torch.manual_seed(0)
    layer, teacher = Fp8Linear(32, 16, implementation="native"), torch.nn.Linear(32, 16)
    assert layer.state_dict().keys() == teacher.state_dict().keys()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(150):
        x = draw((64, 32), dtype=torch.float32, seed=step)
        loss = F.mse_loss(layer(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Two factors with 2.5 % of error each leave 0.13 % of the power of an output.
    assert losses[-1] < 0.01 * losses[0]


def test_unsupported_widths_and_gpus_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    for inputs, outputs in ((24, 16), (16, 24)):
        with pytest.raises(OpsError, match=f"multiples of 16, this layer has {inputs} inputs and {outputs} outputs"):
            fp8_linear(torch.zeros(2, inputs), weight=torch.zeros(outputs, inputs), implementation="native")
    with pytest.raises(OpsError, match="types and last dimensions must agree"):
        fp8_linear(torch.zeros(2, 16), weight=torch.zeros(16, 16, dtype=torch.bfloat16), implementation="native")
    require_fp8(torch.device("cpu"))
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(OpsError, match="A100 of compute capability .8, 0., which has no FP8"):
        require_fp8(torch.device("cuda"))


def test_compiled_layer_equals_eager() -> None:
    layer, x = Fp8Linear(32, 16, implementation="native"), draw((8, 32), dtype=torch.float32).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x).sum(), (x, layer.weight)),
        torch.autograd.grad(layer(x).sum(), (x, layer.weight)),
        strict=True,
    ):
        assert torch.equal(a, b)

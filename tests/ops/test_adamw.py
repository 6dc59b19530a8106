"""FusedAdamW against torch's AdamW: stochastic rounding, clipping without a host sync, and the Optimizer interface."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_share4v.errors import OpsError
from megatron_share4v.ops.adamw import AdamWStep, adamw_, clip_coefficient, rounding_keys, sum_of_squares
from megatron_share4v.ops.adamw_optimizer import FusedAdamW
from megatron_share4v.ops.op import Implementation
from tools.op_cases.record import draw

SHAPES = ((33, 5), (7,), (1,), (64, 16))
implementations = pytest.mark.parametrize("implementation", ["native", "reference"])


@pytest.fixture(autouse=True)
def native(native_ops: None) -> None:
    """Load the native ops: both implementations are available."""


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(draw(shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(SHAPES)]


def give_gradients(of: list[torch.nn.Parameter], step: int) -> None:
    for seed, parameter in enumerate(of):
        parameter.grad = draw(tuple(parameter.shape), dtype=parameter.dtype, seed=100 * step + seed) / 4


def grouped(of: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": of[:2], "lr": 3e-3}, {"params": of[2:], "weight_decay": 0.0}]


@implementations
def test_twenty_steps_equal_torchs(implementation: Implementation) -> None:
    actual, baseline = parameters(), parameters()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    fused = FusedAdamW(grouped(actual), **options, implementation=implementation)
    torchs = torch.optim.AdamW(grouped(baseline), **options)
    for step in range(20):
        for optimizer, held in ((fused, actual), (torchs, baseline)):
            give_gradients(held, step)
            # One parameter starts late, with a step count of its own.
            held[1].grad = None if step < 3 else held[1].grad
            optimizer.step()
    for a, b in zip(actual, baseline, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())
        state, expected = fused.state[a], torchs.state[b]
        assert state.keys() == expected.keys() and state["step"] == expected["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            # Gradients of size 1/4 can cancel in a moment; the difference has the error of the terms.
            torch.testing.assert_close(state[name], expected[name], rtol=1e-6, atol=1e-6 / 4)


@implementations
def test_device_side_clipping_equals_torchs(implementation: Implementation) -> None:
    actual, baseline = parameters(), parameters()
    fused, torchs = FusedAdamW(actual, lr=1e-2, implementation=implementation), torch.optim.AdamW(baseline, lr=1e-2)
    for max_norm in (0.5, 1e6):
        give_gradients(actual, 1), give_gradients(baseline, 1)
        norm = torch.nn.utils.clip_grad_norm_(baseline, max_norm)
        squared = sum_of_squares([parameter.grad for parameter in actual], implementation=implementation)
        torch.testing.assert_close(squared.sqrt(), norm, rtol=2e-6, atol=0)
        fused.gradient_scale = clip_coefficient(squared, max_norm=max_norm)
        kept = actual[0].grad.clone()
        fused.step(), torchs.step()
        assert torch.equal(actual[0].grad, kept) and fused.gradient_scale is None
        for a, b in zip(actual, baseline, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def one_step(
    weight: torch.Tensor, *, keys: list[int], implementation: Implementation, rate: float = 1e-3
) -> torch.Tensor:
    """Update with gradients of 1 at the first step, so that each weight decreases by `rate`."""
    weight = weight.clone()
    zeros = [torch.zeros(weight.shape) for _ in range(2)]
    adamw_(
        [weight],
        grads=[torch.ones_like(weight)],
        means=zeros[:1],
        squares=zeros[1:],
        step=AdamWStep(rate, 0.9, 0.999, 1e-8, 0.0, 1),
        keys=keys,
        implementation=implementation,
    )
    return weight


@implementations
def test_stochastic_rounding_keeps_the_mean_of_small_steps(implementation: Implementation) -> None:
    count, rate = 20_000, 1e-3
    weight = torch.full((count,), 1.5, dtype=torch.bfloat16)  # units of 2**-7, the step is an eighth of one
    assert torch.equal(one_step(weight, keys=[], implementation=implementation, rate=rate), weight)
    moved = one_step(weight, keys=rounding_keys(seed=5, step=1, numbers=[0]), implementation=implementation, rate=rate)
    share = (moved != weight).double().mean().item()
    assert set(moved.double().unique().tolist()) == {1.5, 1.5 - 2**-7}
    expected = rate * 2**7
    # Five standard deviations of a mean of `count` draws.
    assert abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


@implementations
def test_noise_depends_only_on_seed_step_and_tensor(implementation: Implementation) -> None:
    weight = draw((4000,), dtype=torch.bfloat16)
    keys = {name: rounding_keys(**of) for name, of in {
        "here": {"seed": 1, "step": 2, "numbers": [3]},
        "other seed": {"seed": 2, "step": 2, "numbers": [3]},
        "other step": {"seed": 1, "step": 3, "numbers": [3]},
        "other tensor": {"seed": 1, "step": 2, "numbers": [4]},
    }.items()}  # fmt: skip
    moved = {name: one_step(weight, keys=key, implementation=implementation) for name, key in keys.items()}
    assert torch.equal(moved["here"], one_step(weight, keys=keys["here"], implementation=implementation))
    for name in keys.keys() - {"here"}:
        assert (moved[name] != moved["here"]).float().mean() > 0.1, name


def test_native_and_reference_draw_the_same_bits() -> None:
    weight, keys = draw((30_000,), dtype=torch.bfloat16), rounding_keys(seed=1, step=1, numbers=[0])
    native, reference = (one_step(weight, keys=keys, implementation=which) for which in ("native", "reference"))
    # Before rounding a value may differ by 2**-24, which changes about one rounding in 2**15.
    assert (native != reference).float().mean() < 1e-3


@implementations
def test_bf16_squares_decay_when_gradients_vanish(implementation: Implementation) -> None:
    """0.999 of a bf16 value rounds to that value: rounded to nearest it would never decrease."""
    for seed, expected in ((None, 1.0), (3, 0.999**400)):
        parameter = torch.nn.Parameter(torch.zeros(2000, dtype=torch.bfloat16))
        optimizer = FusedAdamW(
            [parameter], lr=0.0, average_dtype=torch.bfloat16, seed=seed, implementation=implementation
        )
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
        for _ in range(400):
            optimizer.step()
        mean = optimizer.state[parameter]["exp_avg_sq"].double().mean().item()
        # Each rounding deviates by at most half an ulp, 2**-9; 400 of them over 2000 elements give under 1e-3.
        assert abs(mean - expected) < 5e-3


def test_non_finite_values_stay_non_finite() -> None:
    weight = torch.tensor([float("inf"), float("nan"), 1.0], dtype=torch.bfloat16)
    moved = one_step(weight, keys=rounding_keys(seed=0, step=0, numbers=[0]), implementation="native")
    assert moved[0] == float("inf") and moved[1].isnan() and moved[2].isfinite()


@pytest.mark.parametrize("average_dtype", [torch.float32, torch.bfloat16])
def test_state_dict_resume_is_bitwise_exact(average_dtype: torch.dtype) -> None:
    def fresh(held: list[torch.nn.Parameter]) -> FusedAdamW:
        return FusedAdamW(grouped(held), lr=1e-2, average_dtype=average_dtype, seed=4, implementation="native")

    held = parameters(torch.bfloat16)
    optimizer = fresh(held)
    for step in range(3):
        give_gradients(held, step)
        optimizer.step()
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in held]
    resumed = fresh(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 5):
        for of, which in ((held, optimizer), (again, resumed)):
            give_gradients(of, step)
            which.step()
    for a, b in zip(held, again, strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a]["exp_avg"].dtype == resumed.state[b]["exp_avg"].dtype == average_dtype


def test_in_place_of_keeps_groups_and_state() -> None:
    actual, baseline = parameters(), parameters()
    old, torchs = (torch.optim.AdamW(grouped(held), lr=1e-2, weight_decay=0.1) for held in (actual, baseline))
    give_gradients(actual, 0), give_gradients(baseline, 0)
    old.step(), torchs.step()
    new = FusedAdamW.in_place_of(old, implementation="native")
    assert new.param_groups is old.param_groups and isinstance(new, torch.optim.AdamW)
    assert new.state[actual[0]]["exp_avg"] is old.state[actual[0]]["exp_avg"]
    give_gradients(actual, 1), give_gradients(baseline, 1)
    new.step(), torchs.step()
    for a, b in zip(actual, baseline, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_unsupported_options_raise() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = FusedAdamW([{"params": [parameter], "amsgrad": True}], implementation="native")
    with pytest.raises(OpsError, match="no amsgrad"):
        optimizer.step()
    with pytest.raises(OpsError, match="float16"):
        FusedAdamW([parameter], average_dtype=torch.float16, implementation="native")
    with pytest.raises(RuntimeError, match="number 0 of gradients is Float"):
        adamw_(
            [torch.ones(2)],
            grads=[torch.ones(3)],
            means=[torch.ones(2)],
            squares=[torch.ones(2)],
            step=AdamWStep(1, 0, 0, 0, 0, 1),
            implementation="native",
        )

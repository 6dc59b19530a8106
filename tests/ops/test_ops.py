"""Every op, native and reference, against the reference in fp64; and torch's checks of custom ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from ops_walk import call, check, check_registration, poison_empty_memory

from tools.op_cases import OPS
from tools.op_cases.record import Case, OpCases

CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in OPS for case in op.cases()]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    poison_empty_memory()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_native_matches_the_reference(native_ops: None, op: OpCases, case: Case) -> None:
    check(op, case, "native")


@pytest.mark.parametrize(("op", "case"), CASES)
def test_reference_keeps_the_tolerance_too(op: OpCases, case: Case) -> None:
    check(op, case, "reference")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_torch_accepts_the_registration(native_ops: None, op: OpCases) -> None:
    checked = [check_registration(op, case, thorough=number == 2) for number, case in enumerate(op.cases())]
    assert sum(checked) >= len(checked)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_threads_do_not_change_the_result(native_ops: None, op: OpCases) -> None:
    for case in op.cases():
        one, _ = call(op, case, "native")
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        many, _ = call(op, case, "native")
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True)), case.name


@pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)
def test_gradcheck_of_the_reference(op: OpCases) -> None:
    small = [case for case in op.cases() if 0 < sum(case.arguments[name].numel() for name in op.differentiable) < 200]
    assert small
    for case in small[:3]:
        leaves = [case.arguments[name].detach().double().requires_grad_() for name in op.differentiable]

        def function(*values: torch.Tensor, case: Case = case) -> object:
            return op.function(
                **case.arguments | dict(zip(op.differentiable, values, strict=True)), implementation="reference"
            )

        assert torch.autograd.gradcheck(function, leaves)


def test_wrong_kernel_is_detected() -> None:
    op = next(op for op in OPS if op.name == "rms_norm")
    case = next(op.cases())

    def wrong(x: torch.Tensor, *, weight: torch.Tensor, eps: float, implementation: str) -> torch.Tensor:
        right = op.function(x, weight=weight, eps=eps, implementation="reference")
        return right if x.dtype == torch.float64 else right * (1 + 1e-5)

    with pytest.raises(AssertionError, match="differs by"):
        check(dataclasses.replace(op, function=wrong), case, "native")


def test_unwritten_output_is_detected() -> None:
    op = next(op for op in OPS if op.name == "image_merge")
    case = next(op.cases())

    def lazy(tokens: torch.Tensor, *, features: torch.Tensor, slots: torch.Tensor, implementation: str) -> torch.Tensor:
        right = op.function(tokens, features=features, slots=slots, implementation="reference")
        return (
            right
            if tokens.dtype == torch.float64
            else torch.where(torch.arange(len(right)).unsqueeze(1) == 4, torch.empty_like(right), right)
        )

    with pytest.raises(AssertionError, match="differs by nan"):
        check(dataclasses.replace(op, function=lazy), case, "native")

"""Cases and benchmarks of the ops of megatron_share4v/ops/adamw.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw as torch_adamw

from megatron_share4v.ops.adamw import AdamWStep, Tensors, adamw_, rounding_keys, sum_of_squares
from megatron_share4v.ops.op import Implementation
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw


def _adamw_out_of_place(
    weight: torch.Tensor,
    *,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    sizes: tuple[int, ...],
    step: AdamWStep,
    scale: torch.Tensor | None,
    keys: tuple[int, ...],
    implementation: Implementation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """adamw_ on copies that are cut into tensors of `sizes`, as a function of tensors that returns tensors."""
    copies = [tensor.clone() for tensor in (weight, grad, mean, square)]
    weights, grads, means, squares = (whole.split(list(sizes)) for whole in copies)
    adamw_(
        weights,
        grads=grads,
        means=means,
        squares=squares,
        step=step,
        scale=scale,
        keys=keys,
        implementation=implementation,
    )
    return copies[0], copies[2], copies[3]


def _sum_of_squares_split(
    values: torch.Tensor, *, sizes: tuple[int, ...], implementation: Implementation
) -> torch.Tensor:
    return sum_of_squares(values.split(list(sizes)), implementation=implementation)


_SIZES = {
    "one element": (1,),
    "odd": (7, 0, 33, 1),
    "aligned": (64, 8, 24),
    "none": (0,),
    "two chunks": (16_385, 30),
    "many": tuple(range(1, 60)),
}


def _cases() -> Iterator[Case]:
    types = {
        "fp32": "fff",
        "bf16, fp32 averages": "bff",
        "bf16 weights and gradients": "bbf",
        "all bf16": "bbb",
        "bf16 averages": "ffb",
        "bf16 gradients": "fbf",
    }
    of = {"f": torch.float32, "b": torch.bfloat16}
    for number, (dtypes, (label, sizes)) in enumerate(itertools.product(types, _SIZES.items())):
        if label in ("two chunks", "many") and dtypes not in ("fp32", "all bf16"):
            continue
        weight, grad, average = (of[kind] for kind in types[dtypes])
        total = sum(sizes)
        yield Case(
            f"{dtypes}, {label}",
            torch.float32 if types[dtypes] == "fff" else torch.bfloat16,
            {
                "weight": draw((total,), dtype=weight),
                "grad": draw((total,), dtype=grad, seed=1),
                "mean": draw((total,), dtype=average, seed=2) / 8,
                "square": draw((total,), dtype=average, seed=3).square() / 8,
                "sizes": sizes,
                "step": AdamWStep(0.01, 0.9, 0.95, 1e-8, 0.1, 1 + number % 3),
                "scale": torch.tensor([0.25]) if number % 2 else None,
                "keys": tuple(rounding_keys(seed=1, step=2, numbers=range(len(sizes)))) if number % 3 else (),
            },
        )


def _squares_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for label, sizes in {**_SIZES, "two chunks": (65_537, 5)}.items():
            yield Case(
                f"{str(dtype).removeprefix('torch.')} {label}",
                dtype,
                {"values": draw((sum(sizes),), dtype=dtype), "sizes": sizes},
            )


def _bench_arguments(device: str, sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    names = ("weights", "grads", "means", "squares")
    arguments = {name: [draw((size,), dtype=dtype, device=device).abs_() for size in sizes] for name in names}
    return arguments | {"counts": [torch.tensor(3.0, device=device) for _ in sizes]}


_NUMBERS = AdamWStep(1e-6, 0.9, 0.95, 1e-8, 0.0, 4)


def _native(*, weights: Tensors, grads: Tensors, means: Tensors, squares: Tensors, counts: Tensors) -> tuple:
    keys = rounding_keys(seed=0, step=4, numbers=range(len(weights))) if weights[0].dtype is torch.bfloat16 else ()
    adamw_(weights, grads=grads, means=means, squares=squares, step=_NUMBERS, keys=keys, implementation="native")
    return ()


def _torch_adamw(*, foreach: bool, fused: bool) -> Any:
    def run(*, weights: Tensors, grads: Tensors, means: Tensors, squares: Tensors, counts: Tensors) -> tuple:
        torch_adamw(
            list(weights), list(grads), list(means), list(squares), [], list(counts), foreach=foreach, fused=fused,
            amsgrad=False, lr=1e-6, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, maximize=False,
        )  # fmt: skip
        return ()

    return run


def _benches() -> Iterator[Bench]:
    single, foreach, fused = (_torch_adamw(foreach=label == 1, fused=label == 2) for label in range(3))
    rows = {
        "fp32, torch foreach": (torch.float32, foreach),
        "fp32, torch single": (torch.float32, single),
        "fp32, torch fused": (torch.float32, fused),
        "bf16, torch foreach": (torch.bfloat16, foreach),
    }
    sizes = {"cpu": (4_194_304, 1_048_576, 4096), "gpu": (45_088_768, 16_777_216, 16_777_216, 4096, 4096)}
    for where, shape in sizes.items():
        for name, (dtype, eager) in rows.items():

            def make(device: str, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> dict[str, Any]:
                return _bench_arguments(device, shape, dtype)

            yield Bench(name, where, make, 7 * dtype.itemsize * sum(shape), None, eager, _native, compiles=False)


def _squares_benches() -> Iterator[Bench]:
    for where, count in (("cpu", 4_194_304), ("gpu", 90_000_000)):

        def make(device: str, count: int = count) -> dict[str, Any]:
            return {
                "values": draw((count,), dtype=torch.float32, device=device),
                "sizes": (count // 2, count - count // 2),
            }

        yield Bench(f"fp32, {count >> 20} M", where, make, 4 * count, None, _eager_squares)


def _eager_squares(values: torch.Tensor, *, sizes: tuple[int, ...]) -> torch.Tensor:
    """Norm as in torch.nn.utils.clip_grad_norm_."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(values.split(list(sizes))))))


_TOLERANCES = {
    torch.float32: Tolerance(1e-6, "one rounding per operation of about ten, 2**-24 each"),
    torch.bfloat16: Tolerance(2**-7, "results are rounded to 8 bits, stochastically by up to a whole unit of 2**-8"),
}
_SQUARES_TOLERANCES = {
    dtype: Tolerance(2e-6, "positive terms summed in fp32 over 4096 at most, in lanes")
    for dtype in (torch.float32, torch.bfloat16)
}
OPS = (
    OpCases("adamw", _adamw_out_of_place, (), _cases, _benches, _TOLERANCES),
    OpCases("sum_of_squares", _sum_of_squares_split, (), _squares_cases, _squares_benches, _SQUARES_TOLERANCES),
)

"""AdamW over many tensors in one pass, and the sum of squares that clipping needs. Loshchilov & Hutter 2019, in the form of torch's AdamW.

Weights and averages are updated in place, in fp32 or bf16; what is stored in bf16 can be rounded stochastically, without which small updates
to large weights are lost. The random bits of an element depend on (seed, step, tensor, element) alone. adamw_optimizer.py is the torch Optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw as torch_adamw

from megatron_share4v.ops.op import Bench, Case, Implementation, Op, Tolerance, draw, register, upcast

Tensors = Sequence[torch.Tensor]
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class AdamWStep:
    """One update's numbers: learning rate, betas, eps, weight decay (times the rate, off the gradient), and which update it is, from 1."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    number: int


def adamw_(
    weights: Tensors,
    *,
    grads: Tensors,
    means: Tensors,
    squares: Tensors,
    step: AdamWStep,
    scale: torch.Tensor | None = None,
    keys: Sequence[int] = (),
    implementation: Implementation,
) -> None:
    """One step of AdamW on every weight, in place; `means` and `squares` are torch's exp_avg and exp_avg_sq.

    All four lists have as many tensors, alike in shape and device, one element type (fp32 or bf16) per list and one for both averages. Gradients
    are multiplied by `scale`, one fp32 on their device (None: 1), which the host never reads. `keys`, one from `keys_for` for each tensor: weights
    and squares in bf16 are rounded stochastically; none: all to nearest. Means are always rounded to nearest: they move by a tenth, not a thousandth.
    """
    if implementation == "native":
        numbers = (step.rate, step.beta1, step.beta2, step.eps, step.decay, step.number)
        torch.ops.share4v.adamw(list(weights), list(grads), list(means), list(squares), scale, *numbers, list(keys))
        return
    for weight, grad, mean, square, key in zip(
        weights, grads, means, squares, keys or [None] * len(weights), strict=True
    ):
        _update(weight, grad=grad, mean=mean, square=square, step=step, scale=scale, key=key)


def _update(
    weight: torch.Tensor,
    *,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step: AdamWStep,
    scale: torch.Tensor | None,
    key: int | None,
) -> None:
    slope = upcast(grad) if scale is None else upcast(grad) * scale
    first = upcast(mean).lerp(slope.to(torch.promote_types(mean.dtype, torch.float32)), 1 - step.beta1)
    second = step.beta2 * upcast(square) + (1 - step.beta2) * slope.square()
    rate, root = step.rate / (1 - step.beta1**step.number), (1 - step.beta2**step.number) ** -0.5
    moved = upcast(weight) * (1 - step.rate * step.decay) - rate * first / (second.sqrt() * root + step.eps)
    mean.copy_(first)
    if key is None:
        square.copy_(second)
        weight.copy_(moved)
        return
    noise = _random_bits(weight, key)
    square.copy_(_cut_off(second, noise & 0xFFFF) if square.dtype is torch.bfloat16 else second)
    weight.copy_(_cut_off(moved, noise >> 16) if weight.dtype is torch.bfloat16 else moved)


def rounding_keys(*, seed: int, step: int, numbers: Sequence[int]) -> list[int]:
    """A key of 62 random bits for each tensor, by its number among all, for this step of a run with this seed. Any two differ in their noise."""
    return [_mixed(_mixed(_mixed(seed) ^ step) ^ number) >> 2 for number in numbers]


def _mixed(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): one to one on 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def _random_bits(like: torch.Tensor, key: int) -> torch.Tensor:
    """As random_bits in csrc/adamw/update.h, in int64."""
    bits = torch.arange(like.numel(), device=like.device).view(like.shape) & MASK
    for add, half in ((False, key & MASK), (True, key >> 32)):
        bits = (bits + half) & MASK if add else bits ^ half
        bits = ((bits ^ bits >> 16) * 0x85EBCA6B) & MASK
        bits = ((bits ^ bits >> 13) * 0xC2B2AE35) & MASK
        bits = bits ^ bits >> 16
    return bits


def _cut_off(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 -> the bf16 below or above, as `noise` [0, 2^16) decides; infinity and NaN stay."""
    bits = value.float().view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return torch.where(finite, (bits + noise.to(torch.int32)) & -0x10000, bits).view(torch.float32)


def sum_of_squares(tensors: Tensors, *, implementation: Implementation) -> torch.Tensor:
    """Over all elements of all tensors, of one type and device: an fp32 scalar on that device. At least one tensor, which may be empty."""
    if implementation == "native":
        return torch.ops.share4v.sum_of_squares(list(tensors))
    return torch.stack([upcast(tensor).square().sum() for tensor in tensors]).sum()


def clip_coefficient(squared_norm: torch.Tensor, *, max_norm: float) -> torch.Tensor:
    """What gradients of this squared L2 norm are to be multiplied by, [1] on its device: min(1, max_norm / (norm + 1e-6)), as torch and Megatron clip."""
    return (max_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0).reshape(1)


def _adamw_apart(
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
    """adamw_ on copies that are cut into tensors of `sizes`: what tests can walk over."""
    wholes = [tensor.clone() for tensor in (weight, grad, mean, square)]
    weights, grads, means, squares = (whole.split(list(sizes)) for whole in wholes)
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
    return wholes[0], wholes[2], wholes[3]


def _sum_of_squares_cut(
    values: torch.Tensor, *, sizes: tuple[int, ...], implementation: Implementation
) -> torch.Tensor:
    return sum_of_squares(values.split(list(sizes)), implementation=implementation)


def _register() -> None:
    register("adamw", fake=lambda weights, grads, means, squares, *numbers: None)
    register("sum_of_squares", fake=lambda tensors: tensors[0].new_empty((), dtype=torch.float32))


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
    for number, (kinds, (which, sizes)) in enumerate(itertools.product(types, _SIZES.items())):
        if which in ("two chunks", "many") and kinds not in ("fp32", "all bf16"):
            continue
        weight, grad, average = (of[kind] for kind in types[kinds])
        total = sum(sizes)
        yield Case(
            f"{kinds}, {which}",
            torch.float32 if types[kinds] == "fff" else torch.bfloat16,
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
        for which, sizes in {**_SIZES, "two chunks": (65_537, 5)}.items():
            yield Case(
                f"{str(dtype).removeprefix('torch.')} {which}",
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


def _torch_adamw(**how: bool) -> Any:
    def run(*, weights: Tensors, grads: Tensors, means: Tensors, squares: Tensors, counts: Tensors) -> tuple:
        torch_adamw(
            *(list(tensors) for tensors in (weights, grads, means, squares)), [], list(counts),
            amsgrad=False, lr=1e-6, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, maximize=False, **how,
        )  # fmt: skip
        return ()

    return run


def _benches() -> Iterator[Bench]:
    single, foreach, fused = (_torch_adamw(foreach=which == 1, fused=which == 2) for which in range(3))
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
    """As torch.nn.utils.clip_grad_norm_."""
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
    Op("adamw", _adamw_apart, (), _cases, _benches, _TOLERANCES, _register),
    Op("sum_of_squares", _sum_of_squares_cut, (), _squares_cases, _squares_benches, _SQUARES_TOLERANCES, _register),
)

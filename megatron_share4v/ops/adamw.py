"""AdamW over many tensors in one kernel, and the sum of squares for clipping.

Loshchilov & Hutter 2019, as in torch's AdamW. Weights and moments are updated in place, in fp32 or bf16; bf16 values
can be rounded stochastically, without which small updates to large weights are lost. The random bits of an element
depend only on (seed, step, tensor, element). adamw_optimizer.py is the torch Optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_share4v.ops.op import Implementation, register_op, upcast

Tensors = Sequence[torch.Tensor]
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class AdamWStep:
    """Hyperparameters of one update.

    `weight_decay` is decoupled (times the learning rate), `number` counts updates from 1.
    """

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
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
    """Apply one AdamW step to every weight, in place; `means` and `squares` are torch's exp_avg and exp_avg_sq.

    All four lists have as many tensors, equal in shape and device, with one dtype (fp32 or bf16) per list and one for
    both moments. Gradients are multiplied by `scale`, one fp32 on their device (None: 1), without a host sync. `keys`,
    one from `rounding_keys` for each tensor: weights and squares in bf16 are rounded stochastically; empty: everything
    to nearest. Means are always rounded to nearest: they move by a tenth per step, not a thousandth.
    """
    if implementation == "native":
        numbers = (step.learning_rate, step.beta1, step.beta2, step.eps, step.weight_decay, step.number)
        torch.ops.share4v.adamw(list(weights), list(grads), list(means), list(squares), scale, *numbers, list(keys))
        return
    for weight, grad, mean, square, key in zip(
        weights, grads, means, squares, keys or itertools.repeat(None, len(weights)), strict=True
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
    corrected_rate, root = step.learning_rate / (1 - step.beta1**step.number), (1 - step.beta2**step.number) ** -0.5
    moved = upcast(weight) * (1 - step.learning_rate * step.weight_decay) - corrected_rate * first / (
        second.sqrt() * root + step.eps
    )
    mean.copy_(first)
    if key is None:
        square.copy_(second)
        weight.copy_(moved)
        return
    noise = _random_bits(weight, key)
    square.copy_(_round_stochastically(second, noise & 0xFFFF) if square.dtype is torch.bfloat16 else second)
    weight.copy_(_round_stochastically(moved, noise >> 16) if weight.dtype is torch.bfloat16 else moved)


def rounding_keys(*, seed: int, step: int, numbers: Sequence[int]) -> list[int]:
    """Return a key of 62 random bits for each tensor number, for this step of a run with this seed; all keys differ."""
    return [_splitmix64(_splitmix64(_splitmix64(seed) ^ step) ^ number) >> 2 for number in numbers]


def _splitmix64(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014): a bijection on 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def _random_bits(like: torch.Tensor, key: int) -> torch.Tensor:
    """Same as random_bits in csrc/adamw/update.h, in int64."""
    bits = torch.arange(like.numel(), device=like.device).view(like.shape) & MASK
    for add, half in ((False, key & MASK), (True, key >> 32)):
        bits = (bits + half) & MASK if add else bits ^ half
        bits = ((bits ^ bits >> 16) * 0x85EBCA6B) & MASK
        bits = ((bits ^ bits >> 13) * 0xC2B2AE35) & MASK
        bits = bits ^ bits >> 16
    return bits


def _round_stochastically(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round fp32 down or up to bf16 by `noise` [0, 2^16); infinity and NaN are unchanged."""
    bits = value.float().view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return torch.where(finite, (bits + noise.to(torch.int32)) & -0x10000, bits).view(torch.float32)


def sum_of_squares(tensors: Tensors, *, implementation: Implementation) -> torch.Tensor:
    """Return the sum of squares of all elements, an fp32 scalar on the device of `tensors`.

    At least one tensor, which may be empty; all of one dtype and device.
    """
    if implementation == "native":
        return torch.ops.share4v.sum_of_squares(list(tensors))
    return torch.stack([upcast(tensor).square().sum() for tensor in tensors]).sum()


def clip_coefficient(squared_norm: torch.Tensor, *, max_norm: float) -> torch.Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), [1], of a squared L2 norm on its device, as torch and Megatron clip."""
    return (max_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0).reshape(1)


def register_ops() -> None:
    """Register fake kernels with torch."""
    register_op("adamw", fake=lambda weights, grads, means, squares, *numbers: None)
    register_op("sum_of_squares", fake=lambda tensors: tensors[0].new_empty((), dtype=torch.float32))


OPS = (
    "adamw",
    "sum_of_squares",
)

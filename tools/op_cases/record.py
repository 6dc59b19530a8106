"""Records of what tests and benchmarks know about a fused op: example inputs, tolerances, shapes to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One call; `arguments` are the function's keywords.

    Floating-point tensors are drawn from a fixed seed; `dtype` selects the tolerance.
    """

    name: str
    dtype: torch.dtype
    arguments: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference from the reference in fp64.

    `limit` is relative to the largest value of that output (or gradient), which is taken to be at least `floor`, for
    results that cancel to nothing.
    """

    limit: float
    reason: str
    floor: float = 0.0


@dataclass(frozen=True)
class Bench:
    """One shape to measure.

    `bytes_forward` and `bytes_backward` are the bytes that must be read and written at least; None: no backward pass.
    """

    name: str
    where: str
    """"cpu" or "gpu"."""
    make: Callable[[str], dict[str, Any]] = field(repr=False)
    """Device -> arguments of the function."""
    bytes_forward: int
    bytes_backward: int | None
    eager: Callable[..., Any] | None = field(default=None, repr=False)
    """The usual eager torch form where it is not the reference; same arguments."""
    native: Callable[..., Any] | None = field(default=None, repr=False)
    """The measured native form where it is not the function; same arguments."""
    compiles: bool = True
    """Whether torch.compile supports the eager form."""


@dataclass(frozen=True)
class OpCases:
    """Cases of one op: `function(**arguments, implementation=...)` returns a tensor or a tuple of tensors.

    `differentiable` names the arguments that have a gradient.
    """

    name: str
    function: Callable[..., Any]
    differentiable: tuple[str, ...]
    cases: Callable[[], Iterator[Case]]
    benches: Callable[[], Iterator[Bench]]
    tolerances: Mapping[torch.dtype, Tolerance]


def draw(shape: tuple[int, ...], *, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Draw a tensor of standard normal numbers from a seed."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return values.to(device=device, dtype=dtype)

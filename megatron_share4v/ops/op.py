"""What an op is: a function with a native and a reference implementation, and all that tests and benchmarks need to know about it.

The kernels are in csrc/; registry.py lists the ops; backend.py decides which implementation a process uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Implementation = Literal["native", "reference"]
NAMESPACE = "share4v"


@dataclass(frozen=True)
class Case:
    """One call: `arguments` are the function's keywords. Floating tensors are drawn from a fixed seed; `dtype` picks the tolerance."""

    name: str
    dtype: torch.dtype
    arguments: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Tolerance:
    """`limit`: largest accepted difference from the reference in fp64, as a part of the largest value of that output (or gradient).

    `floor`: that largest value is taken to be no smaller, for results that cancel to nothing.
    """

    limit: float
    reason: str
    floor: float = 0.0


@dataclass(frozen=True)
class Bench:
    """One shape to measure. `bytes_forward` and `bytes_backward` are what must be moved at least, read and written; None: there is no backward."""

    name: str
    where: Literal["cpu", "gpu"]
    make: Callable[[str], dict[str, Any]] = field(repr=False)
    """Device -> arguments of the function."""
    bytes_forward: int
    bytes_backward: int | None
    eager: Callable[..., Any] | None = field(default=None, repr=False)
    """The usual way in eager torch where it is not the reference; same arguments."""
    native: Callable[..., Any] | None = field(default=None, repr=False)
    """What is measured where it is more, or less, than the function; same arguments."""
    compiles: bool = True
    """Whether torch.compile takes the eager form."""


@dataclass(frozen=True)
class Op:
    """`function(**arguments, implementation=...)` returns a tensor or a tuple of tensors; `differentiable` names arguments that have a gradient."""

    name: str
    function: Callable[..., Any]
    differentiable: tuple[str, ...]
    cases: Callable[[], Iterator[Case]]
    benches: Callable[[], Iterator[Bench]]
    tolerances: Mapping[torch.dtype, Tolerance]
    register: Callable[[], None]
    """Gives the loaded library's ops their fake kernels and gradients; called once per process, after loading."""


def draw(shape: tuple[int, ...], *, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Normal numbers from a seed, for cases and benchmarks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(
        device=device, dtype=dtype
    )


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 where it is: what a reference computes in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_registered(name: str) -> bool:
    """Whether the op of the loaded library has its fake kernel already: registering twice is an error in torch."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "Meta")


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Give an op of the loaded library its fake kernel and, with `backward`, its gradient. Does nothing when it has them."""
    if is_registered(name):
        return
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)

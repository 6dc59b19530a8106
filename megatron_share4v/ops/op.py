"""Common parts of the fused ops: the implementation type, and registration with torch.

The kernels are in csrc/; registry.py lists the ops; backend.py decides which implementation a process uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

Implementation = Literal["native", "reference"]
NAMESPACE = "share4v"


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to the dtype that references compute in: fp32, or fp64 for fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_registered(name: str) -> bool:
    """Whether the op of the loaded library has its fake kernel; torch raises an error on a second registration."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "Meta")


def register_op(
    name: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register an op's fake kernel and, with `backward`, its gradient, unless that has been done."""
    if is_registered(name):
        return
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)

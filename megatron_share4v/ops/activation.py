"""Fused bias + GELU (exact, tanh or quick form), bias + SwiGLU.

Hendrycks & Gimpel 2016 (GELU with the exact normal distribution, and its tanh and sigmoid approximations); Shazeer 2020
(SwiGLU).
All compute in fp32 and round once. The backward pass keeps only the input and recomputes the rest.

R: rows (all leading dimensions); W: width of the result.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megatron_share4v.ops.op import Implementation, register_op, upcast


def bias_gelu(x: torch.Tensor, *, bias: torch.Tensor | None = None, implementation: Implementation) -> torch.Tensor:
    """z * P(N < z), z = x + bias; x [..., W], bias [W]."""
    if implementation == "native":
        return torch.ops.share4v.bias_gelu(x, bias)
    return F.gelu(_add_bias(x, bias)).to(x.dtype)


def bias_gelu_tanh(
    x: torch.Tensor, *, bias: torch.Tensor | None = None, implementation: Implementation
) -> torch.Tensor:
    """z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))) / 2, z = x + bias; x [..., W], bias [W].

    SigLIP's activation.
    """
    if implementation == "native":
        return torch.ops.share4v.bias_gelu_tanh(x, bias)
    return F.gelu(_add_bias(x, bias), approximate="tanh").to(x.dtype)


def bias_quick_gelu(
    x: torch.Tensor, *, bias: torch.Tensor | None = None, implementation: Implementation
) -> torch.Tensor:
    """z * sigmoid(1.702 z), z = x + bias; x [..., W], bias [W]. CLIP's activation."""
    if implementation == "native":
        return torch.ops.share4v.bias_quick_gelu(x, bias)
    z = _add_bias(x, bias)
    return (z * torch.sigmoid(1.702 * z)).to(x.dtype)


def bias_swiglu(x: torch.Tensor, *, bias: torch.Tensor | None = None, implementation: Implementation) -> torch.Tensor:
    """silu(gate) * up, [..., W]; x + bias [..., 2 W] is (gate, up), bias [2 W]."""
    if implementation == "native":
        return torch.ops.share4v.bias_swiglu(x, bias)
    gate, up = _add_bias(x, bias).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def _add_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return upcast(x) if bias is None else upcast(x) + upcast(bias)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor, *, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = getattr(torch.ops.share4v, f"{name}_backward")(grad, x, bias)
    return grad_x, None if bias is None else grad_bias


def _fake_backward(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else bias.shape)


def register_ops() -> None:
    """Register fake kernels and gradients with torch."""
    for name, parts in (("bias_gelu", 1), ("bias_gelu_tanh", 1), ("bias_quick_gelu", 1), ("bias_swiglu", 2)):

        def fake(x: torch.Tensor, bias: torch.Tensor | None, parts: int = parts) -> torch.Tensor:
            return x.new_empty(*x.shape[:-1], x.size(-1) // parts)

        register_op(name, fake=fake, setup_context=_save, backward=partial(_backward, name=name))
        register_op(f"{name}_backward", fake=_fake_backward)


OPS = (
    "bias_gelu",
    "bias_gelu_tanh",
    "bias_quick_gelu",
    "swiglu",
    "bias_swiglu",
)

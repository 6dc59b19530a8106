"""RMSNorm, residual + RMSNorm, LayerNorm. Zhang & Sennrich 2019; Ba, Kiros & Hinton 2016.

All compute in fp32 and round once, at the end; a residual sum is rounded before it is normalized, since it is also an
output.

R: rows (all leading dimensions); W: width.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_share4v.ops.op import Implementation, register_op, upcast


def rms_norm(x: torch.Tensor, *, weight: torch.Tensor, eps: float, implementation: Implementation) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., W], weight [W]."""
    if implementation == "native":
        return torch.ops.share4v.rms_norm(x, weight, eps)[0]
    wide = upcast(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * upcast(weight)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, *, residual: torch.Tensor, weight: torch.Tensor, eps: float, implementation: Implementation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [..., W], weight [W]."""
    if implementation == "native":
        normed, total, _ = torch.ops.share4v.add_rms_norm(x, residual, weight, eps)
        return normed, total
    total = x + residual
    return rms_norm(total, weight=weight, eps=eps, implementation="reference"), total


def layer_norm(
    x: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor, eps: float, implementation: Implementation
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; x [..., W], weight and bias [W]."""
    if implementation == "native":
        return torch.ops.share4v.layer_norm(x, weight, bias, eps)[0]
    wide = upcast(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * upcast(weight) + upcast(bias)).to(x.dtype)


def _empty_rows(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)


def _empty_contiguous(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_rms(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _rms_backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple:
    if grad is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    return *torch.ops.share4v.rms_norm_backward(grad, None, x, weight, rstd), None


def _save_add_rms(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _add_rms_backward(ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None, _: None) -> tuple:
    if grad is None:
        return grad_total, grad_total, None, None
    total, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.share4v.rms_norm_backward(grad, grad_total, total, weight, rstd)
    return grad_x, grad_x, grad_weight, None


def _save_layer(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])


def _layer_backward(ctx: Any, grad: torch.Tensor | None, _: None, __: None) -> tuple:
    if grad is None:
        return None, None, None, None
    return *torch.ops.share4v.layer_norm_backward(grad, *ctx.saved_tensors), None


def register_ops() -> None:
    """Register fake kernels and gradients with torch."""
    register_op(
        "rms_norm",
        fake=lambda x, weight, eps: (_empty_contiguous(x), _empty_rows(x)),
        setup_context=_save_rms,
        backward=_rms_backward,
    )
    register_op(
        "add_rms_norm",
        fake=lambda x, residual, weight, eps: (_empty_contiguous(x), _empty_contiguous(x), _empty_rows(x)),
        setup_context=_save_add_rms,
        backward=_add_rms_backward,
    )
    register_op(
        "rms_norm_backward",
        fake=lambda grad, grad_sum, x, weight, rstd: (_empty_contiguous(x), _empty_contiguous(weight)),
    )
    register_op(
        "layer_norm",
        fake=lambda x, weight, bias, eps: (_empty_contiguous(x), _empty_rows(x), _empty_rows(x)),
        setup_context=_save_layer,
        backward=_layer_backward,
    )
    register_op(
        "layer_norm_backward",
        fake=lambda grad, x, weight, mean, rstd: (
            _empty_contiguous(x),
            _empty_contiguous(weight),
            _empty_contiguous(weight),
        ),
    )


OPS = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
)

"""Linear layer with FP8 matrix products without Transformer Engine: one dynamic scale per tensor.

The products are torch's scaled ones. Forward and input gradient are always in FP8: x and weight as e4m3, the output's
gradient as e5m2. GPUs from compute capability 8.9 on have FP8 products; the CPU computes the same numbers, slowly.

T: rows (all leading dimensions); I: inputs; O: outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_share4v.errors import OpsError
from megatron_share4v.ops.fp8 import DIM_MULTIPLE, fp8_cast, fp8_cast_both, fp8_cast_transposed, fp8_scale
from megatron_share4v.ops.op import Implementation

CAPABILITY = (8, 9)


def require_fp8(device: torch.device) -> None:
    """Raise OpsError where `device` has no FP8 matrix products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise OpsError(
            f"FP8 was requested on {torch.cuda.get_device_name(device)} of compute capability "
            f"{torch.cuda.get_device_capability(device)}, which has no FP8 matrix products; they need {CAPABILITY} "
            "(Ada, Hopper, Blackwell). Train in bf16 there"
        )


def fp8_linear(
    x: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    precise_weight_grad: bool = False,
    implementation: Implementation,
) -> torch.Tensor:
    """x @ weight.T + bias; x [..., I], weight [O, I], bias [O] and the result are all fp32 or all bf16.

    Raises OpsError.

    `precise_weight_grad`: compute the weight gradient from x and the output's gradient in their own dtype; saves x, 2
    bytes per element in bf16, instead of its codes, 1 byte. I and O must be multiples of 16; T need not: codes summed
    over T are padded with zeros. `implementation` selects the casts; the products are torch's in both.
    """
    outputs, inputs = weight.shape
    if x.size(-1) != inputs or x.dtype != weight.dtype:
        got = f"x {x.dtype} {list(x.shape)} for a weight {weight.dtype} {list(weight.shape)}"
        raise OpsError(f"fp8_linear got {got}; types and last dimensions must agree")
    if inputs % DIM_MULTIPLE or outputs % DIM_MULTIPLE:
        raise OpsError(
            f"FP8 matrix products need widths in multiples of {DIM_MULTIPLE}, this layer has {inputs} inputs and "
            f"{outputs} outputs (of this tensor rank); keep it in bf16 or split it over fewer ranks"
        )
    y = _Fp8Linear.apply(x.reshape(-1, inputs), weight, precise_weight_grad, implementation).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class Fp8Linear(torch.nn.Linear):
    """torch.nn.Linear by fp8_linear: same parameters, same names."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        precise_weight_grad: bool = False,
        implementation: Implementation,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        require_fp8(self.weight.device)
        self.precise_weight_grad = precise_weight_grad
        self.implementation = implementation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        return fp8_linear(
            x,
            weight=self.weight,
            bias=self.bias,
            precise_weight_grad=self.precise_weight_grad,
            implementation=self.implementation,
        )


class _Fp8Linear(torch.autograd.Function):
    """Autograd function that saves of x what the weight gradient needs, and of the weight its scale.

    The weight is cast again, transposed, in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, precise: bool, implementation: Implementation
    ) -> torch.Tensor:
        options: dict[str, Any] = {"format": "e4m3", "implementation": implementation}
        x_scale, weight_scale = fp8_scale(x, **options), fp8_scale(weight, **options)
        saved: torch.Tensor | None
        if ctx.needs_input_grad[1] and not precise:
            codes, saved = fp8_cast_both(x, scale=x_scale, **options)
        else:
            codes, saved = fp8_cast(x, scale=x_scale, **options), x if ctx.needs_input_grad[1] else None
        ctx.precise, ctx.implementation = precise, implementation
        ctx.save_for_backward(saved, x_scale, weight, weight_scale)
        return _scaled_matmul(
            codes, fp8_cast(weight, scale=weight_scale, **options), x_scale, weight_scale, x.dtype, fast=True
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        saved, x_scale, weight, weight_scale = ctx.saved_tensors
        options: dict[str, Any] = {"format": "e5m2", "implementation": ctx.implementation}
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        by_codes = wants_weight and not ctx.precise
        grad_x = grad_weight = codes = transposed = None
        if wants_x or by_codes:
            scale = fp8_scale(grad, **options)
        if wants_x and by_codes:
            codes, transposed = fp8_cast_both(grad, scale=scale, **options)
        elif wants_x:
            codes = fp8_cast(grad, scale=scale, **options)
        elif by_codes:
            transposed = fp8_cast_transposed(grad, scale=scale, **options)
        if codes is not None:
            weight_transposed = fp8_cast_transposed(
                weight, scale=weight_scale, format="e4m3", implementation=ctx.implementation
            )
            grad_x = _scaled_matmul(codes, weight_transposed, scale, weight_scale, grad.dtype, fast=False)
        if transposed is not None:
            grad_weight = _scaled_matmul(transposed, saved, scale, x_scale, grad.dtype, fast=False)
        elif wants_weight:
            grad_weight = grad.t() @ saved
        return grad_x, grad_weight, None, None


def _scaled_matmul(
    left: torch.Tensor,
    right: torch.Tensor,
    left_scale: torch.Tensor,
    right_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    fast: bool,
) -> torch.Tensor:
    """(left * left_scale) @ (right * right_scale).T of codes [M, K], [N, K].

    `fast`: accumulate in the tensor cores' 14 bits, precise enough for the forward pass.
    """
    if not left.numel():
        return torch.zeros(left.size(0), right.size(0), dtype=dtype, device=left.device)
    if left.device.type == "cpu":
        # torch's CPU kernel is a reference loop on some processors (torch 2.13 with AMX: 0.58 s for 256 x 128 x 384
        # against 0.6 ms here). Codes are exact in fp32, so only the order of summation differs.
        return ((left.float() @ right.float().t()) * (left_scale * right_scale)).to(dtype)
    return torch._scaled_mm(
        left, right.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )

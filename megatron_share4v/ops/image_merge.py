"""Write of image features into the token embeddings at their slots, in one kernel and without a host sync.

T: tokens; M: features; H: width.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_share4v.ops.op import Implementation, register_op


def image_merge(
    tokens: torch.Tensor, *, features: torch.Tensor, slots: torch.Tensor, implementation: Implementation
) -> torch.Tensor:
    """`tokens` [T, H] with row slots[i] replaced by features[i]; features [M, H], slots [M] int64, distinct.

    The gradient of `tokens` is zero at the slots; that of `features` is gathered from them. A slot out of range raises
    on the CPU and traps on a GPU.
    """
    if implementation == "native":
        return torch.ops.share4v.image_merge(tokens, features, slots)[0]
    return tokens.index_copy(0, slots, features)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[2], output[1])


def _backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple:
    for_tokens, for_features = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None
    grad_tokens, grad_features = torch.ops.share4v.image_merge_backward(
        grad, *ctx.saved_tensors, for_tokens, for_features
    )
    return grad_tokens if for_tokens else None, grad_features if for_features else None, None


def _fake_backward(
    grad: torch.Tensor, slots: torch.Tensor, source: torch.Tensor, for_tokens: bool, for_features: bool
) -> tuple:
    width = grad.size(1)
    return grad.new_empty(grad.size(0) if for_tokens else 0, width), grad.new_empty(
        slots.size(0) if for_features else 0, width
    )


def register_ops() -> None:
    """Register fake kernels and gradients with torch."""
    register_op(
        "image_merge",
        fake=lambda tokens, features, slots: (
            torch.empty_like(tokens, memory_format=torch.contiguous_format),
            tokens.new_empty(tokens.size(0), dtype=torch.int32),
        ),
        setup_context=_setup_context,
        backward=_backward,
    )
    register_op("image_merge_backward", fake=_fake_backward)


OPS = ("image_merge",)

"""Image features into the token embeddings at their slots: one pass, no host synchronisation. T tokens, M features, H width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_share4v.ops.op import Bench, Case, Implementation, Op, Tolerance, draw, register

SEQUENCE, PATCHES, WIDTH = 776, 576, 4096  # one sample of stage 1: an image and 200 positions of text


def image_merge(
    tokens: torch.Tensor, *, features: torch.Tensor, slots: torch.Tensor, implementation: Implementation
) -> torch.Tensor:
    """`tokens` [T, H] with row slots[i] replaced by features[i]; features [M, H], slots [M] int64, distinct.

    The gradient of `tokens` is zero at the slots; that of `features` is gathered from them. A slot outside raises on the CPU and traps on a GPU.
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


def _register() -> None:
    register(
        "image_merge",
        fake=lambda tokens, features, slots: (
            torch.empty_like(tokens, memory_format=torch.contiguous_format),
            tokens.new_empty(tokens.size(0), dtype=torch.int32),
        ),
        setup_context=_setup_context,
        backward=_backward,
    )
    register("image_merge_backward", fake=_fake_backward)


def _cases() -> Iterator[Case]:
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        slots = {
            "one run": (12, 8, torch.arange(3, 9)),
            "everything": (5, 16, torch.arange(5)),
            "odd rows, shuffled": (20, 7, shuffled[:11]),
            "no images": (6, 8, torch.arange(0)),
            "no tokens": (0, 8, torch.arange(0)),
            "wide": (9, 2056, torch.tensor([8, 0, 4])),
        }
        for which, (length, width, at) in slots.items():
            tokens, features = draw((length, width), dtype=dtype), draw((len(at), width), dtype=dtype, seed=1)
            yield Case(f"{name} {which}", dtype, {"tokens": tokens, "features": features, "slots": at})
        strided = {
            "tokens": draw((8, 10), dtype=dtype).t(),
            "features": draw((4, 16), dtype=dtype, seed=1)[:, ::2],
            "slots": shuffled[shuffled < 8][::2],
        }
        yield Case(f"{name} strides", dtype, strided)


def _benches() -> Iterator[Bench]:
    for name, where, samples, width in (
        ("16 samples, 7B", "gpu", 16, WIDTH),
        ("2 samples, width 1024", "cpu", 2, 1024),
        ("1 sample, 7B", "cpu", 1, WIDTH),
    ):

        def make(device: str, samples: int = samples, width: int = width) -> dict[str, Any]:
            slots = (torch.arange(samples).unsqueeze(1) * SEQUENCE + torch.arange(PATCHES) + 35).flatten().to(device)
            tokens = draw((samples * SEQUENCE, width), dtype=torch.bfloat16, device=device)
            return {
                "tokens": tokens,
                "features": draw((len(slots), width), dtype=torch.bfloat16, device=device),
                "slots": slots,
            }

        rows, images, row_bytes = samples * SEQUENCE, samples * PATCHES, 2 * width
        yield Bench(name, where, make, 2 * rows * row_bytes, (2 * rows + images) * row_bytes)


OPS = (
    Op(
        "image_merge",
        image_merge,
        ("tokens", "features"),
        _cases,
        _benches,
        {dtype: Tolerance(0.0, "values are copied") for dtype in (torch.float32, torch.bfloat16)},
        _register,
    ),
)

"""Cases and benchmarks of the ops of megatron_share4v/ops/patchify.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_share4v.ops.patchify import patchify
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw

SIDE, PATCH = 336, 14  # CLIP ViT-L/14


def _pixels(images: int, height: int, width: int, *, device: str = "cpu") -> torch.Tensor:
    return torch.randint(
        0, 256, (images, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).to(device)


def _cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name, table = str(dtype).removeprefix("torch."), draw((3, 256), dtype=dtype)
        for images, height, width, patch in (
            (2, 28, 28, 14),
            (1, 6, 9, 3),
            (3, 8, 4, 4),
            (1, 5, 5, 5),
            (0, 8, 8, 4),
            (2, 3, 2, 1),
            (2, 31, 33, 14),  # pixels left over at the right and below
            (2, 5, 7, 4),
            (1, 9, 8, 4),
            (1, 8, 11, 4),
        ):
            yield Case(
                f"{name} {images}x{height}x{width} by {patch}",
                dtype,
                {"pixels": _pixels(images, height, width), "table": table, "patch": patch},
            )
        mirrored = _pixels(2, 8, 16)[:, :, ::2]
        yield Case(f"{name} strides", dtype, {"pixels": mirrored, "table": table[:, :], "patch": 4})


def _eager(pixels: torch.Tensor, *, table: torch.Tensor, patch: int) -> torch.Tensor:
    """Normalize, then unfold, as an image processor and im2col do."""
    scale, shift = (table[:, -1] - table[:, 0]).float() / 255, table[:, 0].float()
    values = (pixels.permute(0, 3, 1, 2).float() * scale.view(3, 1, 1) + shift.view(3, 1, 1)).to(table.dtype)
    return torch.nn.functional.unfold(values, patch, stride=patch).transpose(1, 2).contiguous()


def _benches() -> Iterator[Bench]:
    for images, where in ((16, "gpu"), (4, "cpu")):

        def make(device: str, images: int = images) -> dict[str, Any]:
            table = torch.linspace(-2, 2, 256, device=device).repeat(3, 1).to(torch.bfloat16)
            return {"pixels": _pixels(images, SIDE, SIDE, device=device), "table": table, "patch": PATCH}

        yield Bench(f"{images} images of {SIDE}", where, make, 3 * 3 * images * SIDE * SIDE, None, _eager)


OPS = (
    OpCases(
        "patchify",
        patchify,
        (),
        _cases,
        _benches,
        {dtype: Tolerance(0.0, "values are looked up") for dtype in (torch.float32, torch.bfloat16)},
    ),
)

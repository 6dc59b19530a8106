"""uint8 pixels to normalised patches in one pass, so that the tower's patch convolution is one matrix product.

N images of H x W pixels, p the patch's side, P = H / p * W / p patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_share4v.ops.op import Bench, Case, Implementation, Op, Tolerance, draw, register

SIDE, PATCH = 336, 14  # CLIP ViT-L/14


def patchify(pixels: torch.Tensor, *, table: torch.Tensor, patch: int, implementation: Implementation) -> torch.Tensor:
    """[N, H, W, 3] uint8 -> [N, P, 3 * p * p] of the table's type; H and W are multiples of p.

    `table` [3, 256] holds what each value of each channel becomes. Patches go row by row, each in the order channel, row, column: that of a
    Conv2d weight, so that `patchify(...) @ weight.flatten(1).t()` is the convolution.
    """
    if implementation == "native":
        return torch.ops.share4v.patchify(pixels, table, patch)
    images, height, width, _ = pixels.shape
    # [N, down, row, across, column, channel] -> [N, down, across, channel, row, column]
    blocks = pixels.reshape(images, height // patch, patch, width // patch, patch, 3).permute(0, 1, 3, 5, 2, 4)
    channels = torch.arange(3, device=pixels.device).mul_(256).view(3, 1, 1)
    return table.flatten()[blocks.long() + channels].reshape(
        images, (height // patch) * (width // patch), 3 * patch * patch
    )


def _fake(pixels: torch.Tensor, table: torch.Tensor, patch: int) -> torch.Tensor:
    images, height, width, _ = pixels.shape
    return table.new_empty(images, (height // patch) * (width // patch), 3 * patch * patch)


def _register() -> None:
    register("patchify", fake=_fake)


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
        ):
            yield Case(
                f"{name} {images}x{height}x{width} by {patch}",
                dtype,
                {"pixels": _pixels(images, height, width), "table": table, "patch": patch},
            )
        mirrored = _pixels(2, 8, 16)[:, :, ::2]
        yield Case(f"{name} strides", dtype, {"pixels": mirrored, "table": table[:, :], "patch": 4})


def _eager(pixels: torch.Tensor, *, table: torch.Tensor, patch: int) -> torch.Tensor:
    """Normalise, then unfold, as a processor and an im2col do."""
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
    Op(
        "patchify",
        patchify,
        (),
        _cases,
        _benches,
        {dtype: Tolerance(0.0, "values are looked up") for dtype in (torch.float32, torch.bfloat16)},
        _register,
    ),
)

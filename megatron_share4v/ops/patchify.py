"""uint8 pixels to normalized patches in one kernel, so that the patch convolution is one matrix product.

N: images of H x W pixels; p: side of a patch; P = floor(H / p) * floor(W / p) patches. Pixels right of and below the
last whole patch are not read.
"""

from __future__ import annotations

import torch

from megatron_share4v.ops.op import Implementation, register_op


def patchify(pixels: torch.Tensor, *, table: torch.Tensor, patch: int, implementation: Implementation) -> torch.Tensor:
    """[N, H, W, 3] uint8 -> [N, P, 3 * p * p] in the table's dtype; H and W are at least p.

    `table` [3, 256] maps each value of each channel. Patches are in row order, each as (channel, row, column): the
    order of a Conv2d weight, so that `patchify(...) @ weight.flatten(1).t()` is the convolution.
    """
    if implementation == "native":
        return torch.ops.share4v.patchify(pixels, table, patch)
    images, down, across = pixels.size(0), pixels.size(1) // patch, pixels.size(2) // patch
    whole = pixels[:, : down * patch, : across * patch]
    # [N, down, row, across, column, channel] -> [N, down, across, channel, row, column]
    blocks = whole.reshape(images, down, patch, across, patch, 3).permute(0, 1, 3, 5, 2, 4)
    channels = torch.arange(3, device=pixels.device).mul_(256).view(3, 1, 1)
    return table.flatten()[blocks.long() + channels].reshape(images, down * across, 3 * patch * patch)


def _fake(pixels: torch.Tensor, table: torch.Tensor, patch: int) -> torch.Tensor:
    images, height, width, _ = pixels.shape
    return table.new_empty(images, (height // patch) * (width // patch), 3 * patch * patch)


def register_ops() -> None:
    """Register fake kernels with torch."""
    register_op("patchify", fake=_fake)


OPS = ("patchify",)

"""Context-parallel part of a micro-batch: one range of positions of every sequence, and the images with slots in it.

C ranks; S positions of a sequence, L = S / C of them on each rank; N images of P slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_share4v.data.records import Batch


def slice_for_context_parallel(batch: Batch, *, rank: int, size: int, sequence_length: int) -> Batch:
    """Positions [rank * L, (rank + 1) * L) of each sequence as a micro-batch with flat positions b * L + s.

    Segments stay those of the whole sequences. An image that crosses a rank boundary goes to both ranks, and each
    writes its own slots: their gradients add up to the full one.
    """
    if size == 1:
        return batch
    assert sequence_length % size == 0, (sequence_length, size)
    length = sequence_length // size
    part: dict[str, Any] = {}
    if batch.token_ids is not None:
        part["token_ids"] = batch.token_ids[:, rank * length : (rank + 1) * length].contiguous()
    if batch.image_slots is not None:
        part |= _images(batch, *_inside(batch.image_slots, rank=rank, length=length, sequence_length=sequence_length))
    if batch.target_rows is not None:
        kept, part["target_rows"] = _inside(
            batch.target_rows, rank=rank, length=length, sequence_length=sequence_length
        )
        if batch.targets is not None:
            part |= {"targets": batch.targets[kept], "trained": batch.targets.numel()}
    return replace(batch, **part)


def _inside(flat: torch.Tensor, *, rank: int, length: int, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the flat positions b * S + s on this rank; return (their indices, the positions as b * L + s)."""
    column = flat % sequence_length
    kept = (column // length == rank).nonzero().flatten()
    local = flat[kept]
    return kept, local // sequence_length * length + local % length


def _images(batch: Batch, kept: torch.Tensor, slots: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Slots, pixels and feature rows of the images on this rank.

    With pixels, only images with a slot here are kept; without, feature_rows picks from the features of all images.
    """
    if batch.pixels is None or not kept.numel():
        pixels = None if batch.pixels is None else batch.pixels[:0]
        return {"image_slots": slots, "pixels": pixels, "feature_rows": kept}
    assert batch.image_slots is not None
    patches = batch.image_slots.numel() // batch.pixels.size(0)
    images, number = (kept // patches).unique(return_inverse=True)
    return {"image_slots": slots, "pixels": batch.pixels[images], "feature_rows": number * patches + kept % patches}

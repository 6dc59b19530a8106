"""Slice of a micro-batch on a context-parallel rank: renumbered positions and the data that belongs to them."""

from __future__ import annotations

import pytest
import torch

from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
from megatron_share4v.data.records import Batch

LENGTH, PATCHES = 12, 4
SEGMENTS = ((7, 5), (12,))


def micro_batch() -> Batch:
    """Two sequences with images at 1 to 4 and 8 to 11 of the first and at 4 to 7 of the second.

    With two ranks the third image crosses the boundary between them.
    """
    slots = torch.cat([start + torch.arange(PATCHES) for start in (1, 8, LENGTH + 4)])
    ids = torch.arange(1, 2 * LENGTH + 1).view(2, LENGTH)
    rows = torch.tensor([5, 6, 10, LENGTH, LENGTH + 11])
    pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 2, 3)
    return Batch(
        token_ids=ids, image_slots=slots, pixels=pixels, target_rows=rows, targets=rows + 100, segments=SEGMENTS
    )


def parts(size: int, batch: Batch) -> list[Batch]:
    return [slice_for_context_parallel(batch, rank=rank, size=size, sequence_length=LENGTH) for rank in range(size)]


def back(flat: torch.Tensor, rank: int, length: int) -> list[int]:
    """Flat positions of the complete micro-batch."""
    return (flat // length * LENGTH + rank * length + flat % length).tolist()


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_the_parts_make_up_the_whole(size: int) -> None:
    whole, length = micro_batch(), LENGTH // size
    found = parts(size, whole)
    assert torch.equal(torch.cat([part.token_ids for part in found], dim=1), whole.token_ids)
    targets = {
        row: target
        for rank, part in enumerate(found)
        for row, target in zip(back(part.target_rows, rank, length), part.targets.tolist())
    }
    assert targets == dict(zip(whole.target_rows.tolist(), whole.targets.tolist()))
    assert {part.trained for part in found} == {5} and {part.segments for part in found} == {SEGMENTS}
    # Image and patch of each slot.
    wanted = {int(slot): (number // PATCHES, number % PATCHES) for number, slot in enumerate(whole.image_slots)}
    given = {}
    for rank, part in enumerate(found):
        images = part.pixels[:, 0, 0, 0].tolist()
        assert len(set(images)) == len(images) and len(part.feature_rows) == len(part.image_slots)
        for slot, row in zip(back(part.image_slots, rank, length), part.feature_rows.tolist()):
            given[slot] = (images[row // PATCHES], row % PATCHES)
    assert given == wanted


def test_only_images_with_a_slot_go_to_a_rank() -> None:
    first, second = parts(2, micro_batch())
    assert first.pixels[:, 0, 0, 0].tolist() == [0, 2] and second.pixels[:, 0, 0, 0].tolist() == [1, 2]
    assert first.feature_rows.tolist() == [0, 1, 2, 3, 4, 5] and second.feature_rows.tolist() == [0, 1, 2, 3, 6, 7]


def test_a_part_without_images_or_labels_is_empty_there() -> None:
    [*_, last] = parts(12, micro_batch())
    assert last.pixels.size(0) == 1  # the second image ends there
    [_, beside, *_] = parts(6, micro_batch())
    assert beside.target_rows.numel() == beside.targets.numel() == 0 and beside.trained == 5
    text = micro_batch()
    without = Batch(text.token_ids, text.image_slots[:0], text.pixels[:0], text.target_rows, text.targets)
    assert all(part.pixels.shape == (0, 2, 2, 3) and part.image_slots.numel() == 0 for part in parts(2, without))


def test_one_rank_has_all() -> None:
    batch = micro_batch()
    assert slice_for_context_parallel(batch, rank=0, size=1, sequence_length=LENGTH) is batch


def test_a_stage_keeps_what_it_has() -> None:
    whole = micro_batch()
    last = slice_for_context_parallel(
        Batch(None, None, None, whole.target_rows, whole.targets), rank=1, size=2, sequence_length=LENGTH
    )
    assert last.token_ids is last.image_slots is last.pixels is None and last.target_rows.tolist() == [0, 4, 11]
    middle = slice_for_context_parallel(
        Batch(None, None, None, None, None, SEGMENTS), rank=1, size=2, sequence_length=LENGTH
    )
    assert middle == Batch(None, None, None, None, None, SEGMENTS)
    # Precomputed features are selected from all features.
    computed = slice_for_context_parallel(
        Batch(whole.token_ids, whole.image_slots, None, whole.target_rows, None), rank=1, size=2, sequence_length=LENGTH
    )
    assert (
        computed.pixels is None and computed.targets is None and computed.feature_rows.tolist() == [4, 5, 6, 7, 10, 11]
    )

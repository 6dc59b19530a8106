"""How many failures are too many, what stands for a text, and how failures are told."""

from dataclasses import replace

import torch

from megatron_share4v.data.store.quarantine import LISTED, TOLERATED, Fault, describe, masked, stand_in, too_many
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX


def test_too_many() -> None:
    assert not too_many(TOLERATED, consumed=16, max_fraction=0.001) and too_many(
        TOLERATED + 1, consumed=16, max_fraction=0.001
    )
    assert not too_many(1000, consumed=1_000_000, max_fraction=0.001) and too_many(
        1001, consumed=1_000_000, max_fraction=0.001
    )
    assert too_many(1, consumed=10**9, max_fraction=0.0) and not too_many(0, consumed=10, max_fraction=0.0)


def test_stand_ins_take_the_place_that_the_index_gives() -> None:
    example = stand_in("s:k", text_length=7, has_image=True)
    assert example.input_ids.tolist() == [IMAGE_TOKEN_INDEX] + [0] * 6 and example.labels.tolist() == [IGNORE_INDEX] * 7
    assert stand_in("s:k", text_length=3, has_image=False).input_ids.tolist() == [0] * 3
    trained = torch.tensor([IGNORE_INDEX, 5, 6])
    assert (
        masked(replace(stand_in("s:k", text_length=3, has_image=False), labels=trained)).labels.tolist()
        == [IGNORE_INDEX] * 3
    )


def test_long_lists_are_cut() -> None:
    faults = [Fault(row, f"shard:{row}", f"shard:{row}: crc32 is wrong") for row in range(LISTED + 3)]
    text = describe(faults)
    assert (
        text.startswith("\n  shard:0: crc32 is wrong\n  shard:1: ")
        and text.endswith("\n  and 3 more")
        and text.count("\n") == LISTED + 1
    )

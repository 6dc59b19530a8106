"""Limit of unreadable samples, placeholder examples, and the list of faults in messages."""

from dataclasses import replace

import torch

from megatron_share4v.data.store.quarantine import (
    LISTED,
    TOLERATED,
    Fault,
    exceeds_limit,
    format_faults,
    mask_labels,
    placeholder_example,
)
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX


def test_too_many() -> None:
    assert not exceeds_limit(TOLERATED, consumed=16, max_fraction=0.001) and exceeds_limit(
        TOLERATED + 1, consumed=16, max_fraction=0.001
    )
    assert not exceeds_limit(1000, consumed=1_000_000, max_fraction=0.001) and exceeds_limit(
        1001, consumed=1_000_000, max_fraction=0.001
    )
    assert exceeds_limit(1, consumed=10**9, max_fraction=0.0) and not exceeds_limit(0, consumed=10, max_fraction=0.0)


def test_placeholder_examples_have_the_length_of_the_index() -> None:
    example = placeholder_example("s:k", text_length=7, has_image=True)
    assert example.input_ids.tolist() == [IMAGE_TOKEN_INDEX] + [0] * 6 and example.labels.tolist() == [IGNORE_INDEX] * 7
    assert placeholder_example("s:k", text_length=3, has_image=False).input_ids.tolist() == [0] * 3
    trained = torch.tensor([IGNORE_INDEX, 5, 6])
    assert (
        mask_labels(replace(placeholder_example("s:k", text_length=3, has_image=False), labels=trained)).labels.tolist()
        == [IGNORE_INDEX] * 3
    )


def test_long_lists_are_cut() -> None:
    faults = [Fault(row, f"shard:{row}", f"shard:{row}: crc32 is wrong") for row in range(LISTED + 3)]
    text = format_faults(faults)
    assert (
        text.startswith("\n  shard:0: crc32 is wrong\n  shard:1: ")
        and text.endswith("\n  and 3 more")
        and text.count("\n") == LISTED + 1
    )

"""Samples that fail while training: what is known of a failure, what stands in the sample's slot, and how many failures are too many.

The slot keeps its place: mean-colour image, masked labels. Who finds failures is loader.py; who tells the other ranks is train/data_feed.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_share4v.data.records import Example
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX

TOLERATED = 8  # failures that never end a run by themselves, unless the accepted fraction is 0
LISTED = 20


@dataclass(frozen=True)
class Fault:
    """One sample that could not be read. row: of the index; name: `shard:key`."""

    row: int
    name: str
    reason: str


def stand_in(name: str, *, text_length: int, has_image: bool) -> Example:
    """What takes the place of a text that cannot be read: as many positions as the index says, nothing trained."""
    ids = torch.zeros(max(text_length, 1), dtype=torch.int64)
    if has_image:
        ids[0] = IMAGE_TOKEN_INDEX
    return Example(key=name, name=name, input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), pixels=None)


def masked(example: Example) -> Example:
    """The same text with nothing trained."""
    return replace(example, labels=torch.full_like(example.labels, IGNORE_INDEX))


def too_many(count: int, *, consumed: int, max_fraction: float) -> bool:
    """Whether `count` failures among `consumed` samples end the run."""
    return count > (max(TOLERATED, max_fraction * consumed) if max_fraction else 0)


def describe(faults: Sequence[Fault]) -> str:
    """The list for a message, one per line, cut where it gets long."""
    lines = [f"\n  {fault.name}: {fault.reason.removeprefix(fault.name + ': ')}" for fault in faults[:LISTED]]
    more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
    return "".join(lines) + more

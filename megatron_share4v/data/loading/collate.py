"""Collation of examples into one micro-batch: image slots in place, labels shifted one position back, rows padded.

B sequences of S positions; a sequence holds one sample, or several when packed. N images, P slots per image, T trained
positions, as in records.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_share4v.data.records import Batch, Example
from megatron_share4v.errors import DataError
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PAD_ID = 0


@dataclass(frozen=True)
class StageRole:
    """Pipeline ends that this rank holds: the first reads tokens and images, the last reads labels."""

    first: bool
    last: bool


@dataclass(frozen=True)
class _ExpandedExample:
    """One example with each placeholder expanded to P positions.

    start: [L], the flat position b * S + s of each input id.
    """

    start: torch.Tensor
    is_image: torch.Tensor


def collate(
    examples: list[Example],
    *,
    sequence_length: int,
    tokens_per_image: int,
    role: StageRole,
    segments: tuple[tuple[int, ...], ...] | None = None,
) -> Batch:
    """Collate examples into a Batch of B x S; fields that `role` does not need are None.

    segments (see Batch): the lengths that the sampler reserved for the examples of each sequence; None: one per
    sequence. Raises DataError naming shard and key when an example is longer than its reserved length, or when its
    placeholders and images differ in number.
    """
    ranges = _sample_ranges(segments or ((sequence_length,),) * len(examples), sequence_length=sequence_length)
    assert len(ranges) == len(examples), (len(ranges), len(examples))
    expanded = [
        _expand(example, start, reserved, tokens_per_image=tokens_per_image)
        for example, (start, reserved) in zip(examples, ranges)
    ]
    size = len(segments or examples) * sequence_length
    token_ids = image_slots = pixels = target_rows = targets = None
    if role.first:
        token_ids, image_slots = _tokens(examples, expanded, size=size, tokens_per_image=tokens_per_image)
        token_ids = token_ids.view(-1, sequence_length)
        pixels = torch.cat([example.pixels for example in examples if example.pixels is not None])
    if role.last:
        target_rows, targets = _targets(examples, expanded)
    return Batch(
        token_ids=token_ids,
        image_slots=image_slots,
        pixels=pixels,
        target_rows=target_rows,
        targets=targets,
        segments=segments,
    )


def _sample_ranges(segments: tuple[tuple[int, ...], ...], *, sequence_length: int) -> list[tuple[int, int]]:
    """List (first flat position, reserved positions) of each sample."""
    ranges = []
    for row, lengths in enumerate(segments):
        start = row * sequence_length
        for length in lengths:
            ranges.append((start, length))
            start += length
        assert start <= (row + 1) * sequence_length, (lengths, sequence_length)
    return ranges


def _expand(example: Example, start: int, reserved: int, *, tokens_per_image: int) -> _ExpandedExample:
    """Compute the flat position of each input id after expanding the image placeholders."""
    is_image = example.input_ids == IMAGE_TOKEN_INDEX
    placeholders = int(is_image.sum())
    if example.pixels is not None and placeholders != len(example.pixels):
        raise DataError(
            f"{example.name}: {placeholders} image placeholders for {len(example.pixels)} images; "
            "prepare the data set again"
        )
    width = torch.where(is_image, tokens_per_image, 1)
    end = width.cumsum(0)
    length = int(end[-1])
    if length > reserved:
        raise DataError(
            f"{example.name}: takes {length} positions, more than the {reserved} that the sampler reserved: "
            "the index does not match this sample; prepare the data set again"
        )
    return _ExpandedExample(start=start + end - width, is_image=is_image)


def _tokens(
    examples: list[Example], expanded: list[_ExpandedExample], *, size: int, tokens_per_image: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill token ids ([size], padding and image slots 0) and list the image slots."""
    token_ids = torch.full((size,), PAD_ID, dtype=torch.int64)
    first_slots = []
    for example, one in zip(examples, expanded):
        token_ids[one.start[~one.is_image]] = example.input_ids[~one.is_image]
        first_slots.append(one.start[one.is_image])
    slots = torch.cat(first_slots).unsqueeze(1) + torch.arange(tokens_per_image)
    return token_ids, slots.flatten()


def _targets(examples: list[Example], expanded: list[_ExpandedExample]) -> tuple[torch.Tensor, torch.Tensor]:
    """List the flat position before each trained token, and the token."""
    rows, targets = [], []
    for example, one in zip(examples, expanded):
        trained = example.labels != IGNORE_INDEX
        trained[0] = False
        rows.append(one.start[trained] - 1)
        targets.append(example.labels[trained])
    return torch.cat(rows), torch.cat(targets)

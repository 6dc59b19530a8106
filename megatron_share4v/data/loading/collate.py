"""Examples to one micro-batch: image placeholders become slots, labels move one position back, sequences are padded to the step's length.

B sequences of S positions; a sequence holds one sample, or several when they are packed. N images, P slots per image, T trained positions, as
in records.py.
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
    """Which ends of the pipeline this rank holds: the first reads tokens and images, the last labels, the middle nothing."""

    first: bool
    last: bool


@dataclass(frozen=True)
class _Spread:
    """One example with its placeholder spread over P positions. start: [L], the flat position b * S + s of each of its positions."""

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
    """Examples -> Batch of B x S; the fields that `role` does not need are None. `segments` (see Batch): the positions that the plan gives to
    the examples of each sequence; None: one example per sequence.

    Raises DataError naming shard and key when an example does not fit into its place, or its placeholders and images differ in number.
    """
    places = _places(segments or ((sequence_length,),) * len(examples), sequence_length=sequence_length)
    assert len(places) == len(examples), (len(places), len(examples))
    spreads = [
        _spread(example, start, room, tokens_per_image=tokens_per_image)
        for example, (start, room) in zip(examples, places)
    ]
    size = len(segments or examples) * sequence_length
    token_ids = image_slots = pixels = target_rows = targets = None
    if role.first:
        token_ids, image_slots = _tokens(examples, spreads, size=size, tokens_per_image=tokens_per_image)
        token_ids = token_ids.view(-1, sequence_length)
        pixels = torch.cat([example.pixels for example in examples])
    if role.last:
        target_rows, targets = _targets(examples, spreads)
    return Batch(
        token_ids=token_ids,
        image_slots=image_slots,
        pixels=pixels,
        target_rows=target_rows,
        targets=targets,
        segments=segments,
    )


def _places(segments: tuple[tuple[int, ...], ...], *, sequence_length: int) -> list[tuple[int, int]]:
    """(first flat position, positions) of each sample."""
    places = []
    for row, lengths in enumerate(segments):
        start = row * sequence_length
        for length in lengths:
            places.append((start, length))
            start += length
        assert start <= (row + 1) * sequence_length, (lengths, sequence_length)
    return places


def _spread(example: Example, start: int, room: int, *, tokens_per_image: int) -> _Spread:
    is_image = example.input_ids == IMAGE_TOKEN_INDEX
    placeholders = int(is_image.sum())
    if example.pixels is not None and placeholders != len(example.pixels):
        raise DataError(
            f"{example.name}: {placeholders} image placeholders for {len(example.pixels)} images; prepare the data set again"
        )
    width = torch.where(is_image, tokens_per_image, 1)
    end = width.cumsum(0)
    length = int(end[-1])
    if length > room:
        raise DataError(
            f"{example.name}: takes {length} positions, more than the {room} that the plan has for it: "
            "the index does not describe this sample; prepare the data set again"
        )
    return _Spread(start=start + end - width, is_image=is_image)


def _tokens(
    examples: list[Example], spreads: list[_Spread], *, size: int, tokens_per_image: int
) -> tuple[torch.Tensor, torch.Tensor]:
    token_ids = torch.full((size,), PAD_ID, dtype=torch.int64)
    first_slots = []
    for example, spread in zip(examples, spreads):
        token_ids[spread.start[~spread.is_image]] = example.input_ids[~spread.is_image]
        first_slots.append(spread.start[spread.is_image])
    slots = torch.cat(first_slots).unsqueeze(1) + torch.arange(tokens_per_image)
    return token_ids, slots.flatten()


def _targets(examples: list[Example], spreads: list[_Spread]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, targets = [], []
    for example, spread in zip(examples, spreads):
        trained = example.labels != IGNORE_INDEX
        trained[0] = False
        rows.append(spread.start[trained] - 1)
        targets.append(example.labels[trained])
    return torch.cat(rows), torch.cat(targets)

"""Examples to one micro-batch: image placeholders become slots, labels move one position back, sequences are padded to the step's length.

B samples, S positions, N images, P slots per image, T trained positions, as in sample.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_share4v.data.sample import Batch, Example
from megatron_share4v.errors import DataError
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PAD_ID = 0


@dataclass(frozen=True)
class Role:
    """Which ends of the pipeline this rank holds: the first reads tokens and images, the last labels, the middle nothing."""

    first: bool
    last: bool


@dataclass(frozen=True)
class _Spread:
    """One example with its placeholder spread over P positions. start: [L], where each of its positions went."""

    start: torch.Tensor
    is_image: torch.Tensor
    length: int


def collate(examples: list[Example], *, sequence_length: int, tokens_per_image: int, role: Role) -> Batch:
    """B examples -> Batch of B x S; the fields that `role` does not need are None.

    Raises DataError naming shard and key when an example does not fit into S, or its placeholders and images differ in number.
    """
    spreads = [_spread(example, sequence_length=sequence_length, tokens_per_image=tokens_per_image) for example in examples]
    token_ids = image_slots = pixels = target_rows = targets = None
    if role.first:
        token_ids, image_slots = _tokens(examples, spreads, sequence_length=sequence_length, tokens_per_image=tokens_per_image)
        pixels = torch.cat([example.pixels for example in examples])
    if role.last:
        target_rows, targets = _targets(examples, spreads, sequence_length=sequence_length)
    return Batch(token_ids=token_ids, image_slots=image_slots, pixels=pixels, target_rows=target_rows, targets=targets)


def _spread(example: Example, *, sequence_length: int, tokens_per_image: int) -> _Spread:
    is_image = example.input_ids == IMAGE_TOKEN_INDEX
    placeholders = int(is_image.sum())
    if example.pixels is not None and placeholders != len(example.pixels):
        raise DataError(f"{example.name}: {placeholders} image placeholders for {len(example.pixels)} images; prepare the data set again")
    width = torch.where(is_image, tokens_per_image, 1)
    end = width.cumsum(0)
    length = int(end[-1])
    if length > sequence_length:
        raise DataError(
            f"{example.name}: takes {length} positions, more than the step's sequence length {sequence_length}: "
            "the index does not describe this sample; prepare the data set again"
        )
    return _Spread(start=end - width, is_image=is_image, length=length)


def _tokens(
    examples: list[Example], spreads: list[_Spread], *, sequence_length: int, tokens_per_image: int
) -> tuple[torch.Tensor, torch.Tensor]:
    token_ids = torch.full((len(examples), sequence_length), PAD_ID, dtype=torch.int64)
    first_slots = []
    for row, (example, spread) in enumerate(zip(examples, spreads)):
        token_ids[row, spread.start[~spread.is_image]] = example.input_ids[~spread.is_image]
        first_slots.append(row * sequence_length + spread.start[spread.is_image])
    slots = torch.cat(first_slots).unsqueeze(1) + torch.arange(tokens_per_image)
    return token_ids, slots.flatten()


def _targets(examples: list[Example], spreads: list[_Spread], *, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, targets = [], []
    for row, (example, spread) in enumerate(zip(examples, spreads)):
        trained = example.labels != IGNORE_INDEX
        trained[0] = False
        rows.append(row * sequence_length + spread.start[trained] - 1)
        targets.append(example.labels[trained])
    return torch.cat(rows), torch.cat(targets)

"""Prompts for generation: a conversation with an open last answer, and its images, as ids with slots and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.loading.collate import StageRole, collate
from megatron_share4v.data.loading.encode import Encoder, check_placeholders
from megatron_share4v.data.records import Example, Turn
from megatron_share4v.text.mask import encode_chat_prompt, encode_prompt

PromptImage = bytes | np.ndarray
"""An encoded image file, or its pixels [H, W, 3] uint8 as the encoder's image policy gives them."""


@dataclass(frozen=True)
class Prompt:
    """Token ids and pixels of one prompt.

    token_ids: [L] int64, 0 at image slots; image_slots: [n * P] positions of the slots; pixels: [n, H, W, 3] uint8.
    """

    token_ids: torch.Tensor
    image_slots: torch.Tensor
    pixels: torch.Tensor


def make_prompt(
    encoder: Encoder, turns: Sequence[Turn], *, image: bytes | None, tokens_per_image: int, name: str = "prompt"
) -> Prompt:
    """Build a prompt from turns that end with a human turn, and an encoded image file.

    Raises DataError for a bad conversation or image.
    """
    ids = encode_prompt(encoder.tokenizer, encoder.template, turns, has_image=image is not None)
    check_placeholders(torch.tensor(ids, dtype=torch.int64), images=int(image is not None))
    return prompt_from_ids(
        encoder, ids, images=[] if image is None else [image], tokens_per_image=tokens_per_image, name=name
    )


def make_chat_prompt(
    encoder: Encoder,
    turns: Sequence[Turn],
    *,
    images: Sequence[PromptImage | None],
    tokens_per_image: int,
    system: str | None = None,
    raw: bool = False,
) -> Prompt:
    """Build a prompt from user-typed turns: `images` has one entry per turn; system and raw as for encode_chat_prompt.

    Raises DataError as make_prompt does.
    """
    has_image = [image is not None for image in images]
    ids = encode_chat_prompt(encoder.tokenizer, encoder.template, turns, images=has_image, system=system, raw=raw)
    files = [image for image in images if image is not None]
    return prompt_from_ids(encoder, ids, images=files, tokens_per_image=tokens_per_image, name="question")


def prompt_from_ids(
    encoder: Encoder, ids: Sequence[int], *, images: Sequence[PromptImage], tokens_per_image: int, name: str
) -> Prompt:
    """Build a prompt from ids with one IMAGE_TOKEN_INDEX per image, in order.

    Raises DataError for a bad image.
    """
    size = encoder.images.image_size
    arrays = [decode(image, encoder.images) if isinstance(image, bytes) else image for image in images]
    decoded = [torch.tensor(array) for array in arrays]
    pixels = torch.stack(decoded) if decoded else torch.empty(0, size, size, 3, dtype=torch.uint8)
    input_ids = torch.tensor(ids, dtype=torch.int64)
    example = Example(key=name, name=name, input_ids=input_ids, labels=input_ids, pixels=pixels)
    length = input_ids.numel() + pixels.size(0) * (tokens_per_image - 1)
    batch = collate(
        [example], sequence_length=length, tokens_per_image=tokens_per_image, role=StageRole(first=True, last=False)
    )
    assert batch.token_ids is not None and batch.image_slots is not None and batch.pixels is not None
    return Prompt(token_ids=batch.token_ids[0], image_slots=batch.image_slots, pixels=batch.pixels)

"""A question to the model: a conversation whose last answer is open, with its image, as ids with the slots in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.loading.collate import StageRole, collate
from megatron_share4v.data.loading.encode import Encoder, check_placeholders
from megatron_share4v.data.records import Example, Turn
from megatron_share4v.text.mask import encode_chat_prompt, encode_prompt


@dataclass(frozen=True)
class Prompt:
    """token_ids: [L] int64, 0 at image slots; image_slots: [n * P] positions of the slots; pixels: [n, H, W, 3] uint8, n mostly 0 or 1."""

    token_ids: torch.Tensor
    image_slots: torch.Tensor
    pixels: torch.Tensor


def make_prompt(
    encoder: Encoder, turns: Sequence[Turn], *, image: bytes | None, tokens_per_image: int, name: str = "prompt"
) -> Prompt:
    """`turns` ends with the human's; `image` is an encoded file. Raises DataError for a bad conversation or image."""
    ids = encode_prompt(encoder.tokenizer, encoder.template, turns, has_image=image is not None)
    check_placeholders(torch.tensor(ids, dtype=torch.int64), images=int(image is not None))
    return prompt_from_ids(
        encoder, ids, images=[] if image is None else [image], tokens_per_image=tokens_per_image, name=name
    )


def make_chat_prompt(
    encoder: Encoder, turns: Sequence[Turn], *, images: Sequence[bytes | None], tokens_per_image: int
) -> Prompt:
    """As make_prompt, of texts that somebody typed: `images` has one entry per turn, and an <image> in a text is text. Raises DataError."""
    ids = encode_chat_prompt(encoder.tokenizer, encoder.template, turns, images=[image is not None for image in images])
    files = [image for image in images if image is not None]
    return prompt_from_ids(encoder, ids, images=files, tokens_per_image=tokens_per_image, name="question")


def prompt_from_ids(
    encoder: Encoder, ids: Sequence[int], *, images: Sequence[bytes], tokens_per_image: int, name: str
) -> Prompt:
    """Ids with one IMAGE_TOKEN_INDEX per image, in order, to a prompt with slots and pixels. Raises DataError for a bad image."""
    size = encoder.images.image_size
    decoded = [torch.tensor(decode(image, encoder.images)) for image in images]
    pixels = torch.stack(decoded) if decoded else torch.empty(0, size, size, 3, dtype=torch.uint8)
    input_ids = torch.tensor(ids, dtype=torch.int64)
    example = Example(key=name, name=name, input_ids=input_ids, labels=input_ids, pixels=pixels)
    length = input_ids.numel() + pixels.size(0) * (tokens_per_image - 1)
    batch = collate(
        [example], sequence_length=length, tokens_per_image=tokens_per_image, role=StageRole(first=True, last=False)
    )
    return Prompt(token_ids=batch.token_ids[0], image_slots=batch.image_slots, pixels=batch.pixels)

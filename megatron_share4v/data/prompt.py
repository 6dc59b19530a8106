"""A question to the model: a conversation whose last answer is open, with its image, as ids with the slots in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_share4v.data.collate import Role, collate
from megatron_share4v.data.decode_pil import decode
from megatron_share4v.data.encode import Encoder, check_placeholders
from megatron_share4v.data.sample import Example, Turn
from megatron_share4v.text.mask import encode_prompt


@dataclass(frozen=True)
class Prompt:
    """token_ids: [L] int64, 0 at image slots; image_slots: [n * P] positions of the slots; pixels: [n, H, W, 3] uint8, n 0 or 1."""

    token_ids: torch.Tensor
    image_slots: torch.Tensor
    pixels: torch.Tensor


def make_prompt(encoder: Encoder, turns: Sequence[Turn], *, image: bytes | None, tokens_per_image: int, name: str = "prompt") -> Prompt:
    """`turns` ends with the human's; `image` is an encoded file. Raises DataError for a bad conversation or image."""
    ids = torch.tensor(encode_prompt(encoder.tokenizer, encoder.template, turns, has_image=image is not None), dtype=torch.int64)
    check_placeholders(ids, images=int(image is not None))
    size = encoder.images.image_size
    pixels = torch.tensor(decode(image, encoder.images)).unsqueeze(0) if image is not None else torch.empty(0, size, size, 3, dtype=torch.uint8)
    example = Example(key=name, name=name, input_ids=ids, labels=ids, pixels=pixels)
    length = ids.numel() + pixels.size(0) * (tokens_per_image - 1)
    batch = collate([example], sequence_length=length, tokens_per_image=tokens_per_image, role=Role(first=True, last=False))
    return Prompt(token_ids=batch.token_ids[0], image_slots=batch.image_slots, pixels=batch.pixels)

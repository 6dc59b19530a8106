"""Encoding of a sample: its conversation tokenised with labels, its image decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.records import Example, Sample
from megatron_share4v.errors import DataError
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_conversation
from megatron_share4v.text.template import Template
from megatron_share4v.text.template_tokens import check_special_tokens, marker_ids, stop_ids
from megatron_share4v.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """Settings that determine how a sample is encoded. max_text_length: positions kept, an image counted as one."""

    tokenizer: Tokenizer
    template: Template
    max_text_length: int
    images: ImagePolicy

    def __post_init__(self) -> None:
        """Raise DataError unless the tokenizer has the template's special tokens."""
        check_special_tokens(self.template, self.tokenizer)
        marker_ids(self.template, self.tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return stop_ids(self.template, self.tokenizer)

    def encode(self, sample: Sample, *, with_pixels: bool) -> Example:
        """Tokenise a sample and, with `with_pixels`, decode its image.

        Raises DataError, starting with shard and key, for a bad conversation, a bad image, or a mismatch of
        placeholders and images.
        """
        try:
            return self._encode(sample, with_pixels=with_pixels)
        except DataError as error:
            raise DataError(f"{sample.name}: {error}") from error

    def _encode(self, sample: Sample, *, with_pixels: bool) -> Example:
        encoded = encode_conversation(
            self.tokenizer, self.template, sample.turns, has_image=sample.has_image, max_length=self.max_text_length
        )
        input_ids = torch.as_tensor(encoded.input_ids, dtype=torch.int64)
        labels = torch.as_tensor(encoded.labels, dtype=torch.int64)
        check_placeholders(input_ids, images=int(sample.has_image))
        pixels = None
        if with_pixels:
            size = self.images.image_size
            decoded = []
            if sample.has_image:
                assert sample.image is not None, "pixels were requested of a sample read without its image"
                decoded = [torch.tensor(decode(sample.image, self.images))]
            pixels = torch.stack(decoded) if decoded else torch.empty(0, size, size, 3, dtype=torch.uint8)
        return Example(key=sample.key, name=sample.name, input_ids=input_ids, labels=labels, pixels=pixels)


def check_placeholders(input_ids: torch.Tensor, *, images: int) -> None:
    """Raise DataError unless the ids hold one placeholder per image."""
    placeholders = int((input_ids == IMAGE_TOKEN_INDEX).sum())
    if placeholders != images:
        raise DataError(
            f"{placeholders} image placeholders left for {images} images after truncation to max_text_length; "
            "write <image> nearer to the start of the conversation, or raise max_text_length"
        )


def count_trained_positions(labels: torch.Tensor) -> int:
    """Count the trained positions of [L] labels; position 0 has no predecessor to predict it."""
    return int((labels[1:] != IGNORE_INDEX).sum())

"""Display of one sample as the model receives it: decoded tokens with trained spans marked, and its pixels."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from PIL import Image

from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.records import Sample
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_conversation
from megatron_share4v.text.template import Template
from megatron_share4v.text.tokenizer import Tokenizer

COLOUR, PLAIN = ("\033[1;32m", "\033[0m"), ("[[", "]]")


def format_sample(
    sample: Sample,
    *,
    tokenizer: Tokenizer,
    template: Template,
    max_text_length: int,
    tokens_per_image: int,
    colour: bool,
) -> str:
    """Decode the ids of a sample to text.

    Trained spans are green, or in [[ ]] without `colour`; other control characters are escaped.
    """
    encoded = encode_conversation(
        tokenizer, template, sample.turns, has_image=sample.has_image, max_length=max_text_length
    )
    opening, closing = COLOUR if colour else PLAIN
    pieces = []
    anchor = tokenizer.encode("x")  # decoding after a token keeps the leading space
    pairs = zip(encoded.input_ids, encoded.labels)
    for (is_image, is_trained), run in groupby(
        pairs, key=lambda pair: (pair[0] == IMAGE_TOKEN_INDEX, pair[1] != IGNORE_INDEX)
    ):
        ids = [token for token, _ in run]
        text = (
            f"<image: {tokens_per_image} positions>"
            if is_image
            else _printable(tokenizer.decode(anchor + ids, skip_special=False)[1:])
        )
        pieces.append(f"{opening}{text}{closing}" if is_trained else text)
    trained = sum(label != IGNORE_INDEX for label in encoded.labels[1:])
    positions = len(encoded.input_ids) + (tokens_per_image - 1) * sample.has_image
    return f"--- {sample.name}: {positions} positions, {trained} trained\n{''.join(pieces)}"


def write_preprocessed(sample: Sample, path: Path, *, policy: ImagePolicy) -> None:
    """Write the pixels that the vision tower receives, before normalisation, as a PNG."""
    assert sample.image is not None, "the sample has no image"
    Image.fromarray(decode(sample.image, policy)).save(path)


def _printable(text: str) -> str:
    """Escape control characters, so that a data set cannot control the terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
    )

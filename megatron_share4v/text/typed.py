"""Text that a user has typed, as opposed to the template's: special tokens and role headers in it are plain text.

A typed `</s>` would otherwise end the turn, and `</s>USER: ... ASSISTANT:` would put words into the assistant's mouth.
Such a marker is encoded one character at a time: the model reads the same characters, but not the ids that it was
trained to take for a boundary. tiktoken likewise never takes text for a special token unless told to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_share4v.text.template import IMAGE_PLACEHOLDER, Template
from megatron_share4v.text.tokenizer import Tokenizer

# Half surrogate pairs, which cannot occur in a text that passed check_unicode.
TYPED_PLACEHOLDER, TOKEN_BREAK = "\ud800", "\ud801"


def escape_placeholder(text: str) -> str:
    """Mark a typed <image>, so that it is not taken for the place of an image; for encode_escaped."""
    return text.replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER)


def escape_typed(text: str, template: Template, tokenizer: Tokenizer) -> str:
    """Mark a typed <image>, and every character of a typed special token or role header; for encode_escaped."""
    markers = sorted({*tokenizer.special_pieces, *_headers(template)}, key=len, reverse=True)
    return re.sub(
        "|".join(map(re.escape, markers)),
        lambda found: "".join(f"{TOKEN_BREAK}{character}" for character in found[0]) + TOKEN_BREAK,
        escape_placeholder(text),
    )


def encode_escaped(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode a text with marks of escape_typed: no token crosses a TOKEN_BREAK."""
    ids: list[int] = []
    for part in text.replace(TYPED_PLACEHOLDER, IMAGE_PLACEHOLDER).split(TOKEN_BREAK):
        if part:
            ids += tokenizer.encode_continuation(part) if ids else tokenizer.encode(part)
    return ids


def _headers(template: Template) -> Iterator[str]:
    """Fixed texts of a template around turns, without the spaces at their ends."""
    frame = template.prompt
    fixed = [*frame.human, frame.header, *frame.answer, frame.between, frame.signal, frame.opening, frame.preamble]
    pieces = [piece for part in fixed for piece in part.split("{system}")] + template.placeholder.split(
        IMAGE_PLACEHOLDER
    )
    yield from (piece.strip() for piece in pieces if piece.strip())

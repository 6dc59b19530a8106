"""Text that a user has typed, as opposed to the template's: special tokens and role headers in it are plain text.

A typed `</s>` would otherwise end the turn, and `</s>USER: ... ASSISTANT:` would put words into the assistant's mouth.
Such a marker is encoded one character at a time: the model reads the same characters, but not the ids that it was
trained to take for a boundary. tiktoken likewise never takes text for a special token unless told to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from megatron_share4v.text.template import IMAGE_PLACEHOLDER, Template
from megatron_share4v.text.tokenizer import Encoding, Tokenizer, check_unicode

# Half surrogate pairs, which cannot occur in a text that passed check_unicode.
TYPED_PLACEHOLDER, TOKEN_BREAK = "\ud800", "\ud801"


def escape_placeholder(text: str) -> str:
    """Mark a typed <image>, so that it is not taken for the place of an image; for encode_escaped."""
    return text.replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER)


def escape_typed(text: str, template: Template, tokenizer: Tokenizer) -> str:
    """Mark a typed <image>, and every character of a typed special token or role header; for encode_escaped."""
    return _break(escape_placeholder(text), {*tokenizer.special_pieces, *_headers(template)})


def escape_special(text: str, tokenizer: Tokenizer) -> str:
    """Mark every character of a special token in a record's text; for encode_escaped.

    Raises DataError for a text that is not valid Unicode, as the marks are.
    """
    check_unicode(text)
    return _break(text, tokenizer.special_pieces)


def encode_escaped(text: str, tokenizer: Tokenizer, *, continues: bool = False) -> Encoding:
    """Encode a text with marks of this module: no token crosses a TOKEN_BREAK. Spans are those of the marked text.

    continues: other text stands before.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for part in text.split(TOKEN_BREAK):
        if part:
            written = part.replace(TYPED_PLACEHOLDER, IMAGE_PLACEHOLDER)
            own, offsets = tokenizer.encode_with_offsets(written, continues=continues or bool(ids))
            ids += own
            spans += [(start + begin, start + end) for begin, end in offsets]
        start += len(part) + len(TOKEN_BREAK)
    return ids, spans


def _break(text: str, markers: Iterable[str]) -> str:
    """Put a TOKEN_BREAK around every character of a marker in `text`; the longest marker counts."""
    found = sorted(markers, key=len, reverse=True)
    if not found:
        return text
    return re.sub(
        "|".join(map(re.escape, found)),
        lambda marker: "".join(f"{TOKEN_BREAK}{character}" for character in marker[0]) + TOKEN_BREAK,
        text,
    )


def _headers(template: Template) -> Iterator[str]:
    """Fixed texts of a template around turns, without the spaces at their ends."""
    frame = template.prompt
    fixed = [*frame.human, frame.header, *frame.answer, frame.between, frame.signal, frame.opening, frame.preamble]
    pieces = [piece for part in fixed for piece in part.split("{system}")] + template.placeholder.split(
        IMAGE_PLACEHOLDER
    )
    yield from (piece.strip() for piece in pieces if piece.strip())

"""Interface of tokenizers: text to ids with character spans, ids to text.

sentencepiece_tokenizer.py reads `tokenizer.model` (LLaMA 2, Vicuna), hf_tokenizer.py `tokenizer.json` (Llama 3, Qwen);
load_tokenizer.py opens either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_share4v.errors import DataError
from megatron_share4v.text.template import IMAGE_PLACEHOLDER
from megatron_share4v.text.tokenizer_config import AddedToken, TokenizerRule

PAD = "<pad>"
LAYOUT_TOKENS = (IMAGE_PLACEHOLDER, PAD)
"""Tokens that the layout llava-hf adds for itself. <image> is no token here: no text gives its id."""
Encoding = tuple[list[int], list[tuple[int, int]]]


class Tokenizer(ABC):
    """A tokenizer. Can be pickled.

    Texts are split at special tokens and added tokens that are written out.

    path: of the file. file_name: its name in a checkpoint. class_name: of transformers' class. bos_id: id that starts
    every text; None without one (Qwen). eos_id: end of a text. pad_id: padding in exports; None without one. unk_id: id
    for what has no token; None where every byte has one. pieces: number of ids before the added tokens. added: tokens
    after the pieces, without <image> and <pad> at the end. vocab_size: last id plus one, without these.
    max_piece_length: no token stands for more characters. special_pieces: names of the special tokens. special_ids: ids
    that decoding drops. special_in_text: whether a special token written out in a record is that token, as in the
    official code for LLaMA; else its characters are text. rule: how a sentencepiece tokenizer tokenises after a special
    token; None for tokenizer.json. states_rule: whether a file or an option states it. space_after_image: whether the
    text after an image gets the leading space of a text at the start. fingerprint: sha256 of all that
    determines the ids, except the rule.
    """

    file_name: str
    class_name: str
    special_in_text: bool
    states_rule: bool = False
    space_after_image: bool = True
    path: Path
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    unk_id: int | None
    pieces: int
    added: tuple[AddedToken, ...]
    vocab_size: int
    max_piece_length: int
    special_pieces: frozenset[str]
    special_ids: frozenset[int]
    rule: TokenizerRule | None
    fingerprint: str

    @property
    def bos_ids(self) -> list[int]:
        """Ids before every text: [bos_id], or none."""
        return [] if self.bos_id is None else [self.bos_id]

    @abstractmethod
    def summary(self) -> str:
        """Describe the tokenizer in a few words, for a log."""

    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Return the content of the files of a checkpoint, by name, from which an equal tokenizer is opened."""

    @abstractmethod
    def token_id(self, name: str) -> int | None:
        """Return the id of the special or added token `name`; None without one. <image> is found where it has an id."""

    @abstractmethod
    def is_cut_out(self, token_id: int) -> bool:
        """Whether text is split at the token: a special piece or an added token."""

    def encode(self, text: str) -> list[int]:
        """Encode `text` without a leading bos_id. Raises DataError for a text that is not valid Unicode."""
        return self.encode_with_offsets(text)[0]

    def encode_continuation(self, text: str) -> list[int]:
        """Encode `text` as what follows other text: without a leading space. Raises DataError as `encode`."""
        return self.encode_with_offsets(text, continues=True)[0]

    @abstractmethod
    def encode_with_offsets(self, text: str, *, continues: bool = False) -> Encoding:
        """Encode `text`; return the ids and, for each, its half-open span of characters; the spans cover the text.

        continues: other text stands before, so that the first part has no leading space. A leading space that the
        tokenizer adds has no character: a token of it alone has an empty span. Of several tokens of one character, the
        last has its span, the others the same or an empty one at its start.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode `ids`, dropping special tokens; without `skip_special` they are written out.

        Bytes that do not (yet) form a UTF-8 character become U+FFFD.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token adds after other text: part of a character, or a special token's name."""


def image_token_id(tokenizer: Tokenizer, *, reuse: str | None = None) -> int:
    """Return the id of image positions in exported files; here they are IMAGE_TOKEN_INDEX and never embedded.

    It is the id of the tokenizer's own <image>; else of the token `reuse`, if a configuration names one; else the next
    id after the tokenizer's last one, which is a spare row of a model with more rows than tokens, or a new row.

    Raises DataError when the tokenizer does not have `reuse`.
    """
    own = tokenizer.token_id(IMAGE_PLACEHOLDER)
    if own is not None:
        return own
    if reuse is None:
        return tokenizer.vocab_size
    found = tokenizer.token_id(reuse)
    if found is None:
        raise DataError(
            f"tokenizer {tokenizer.path}: has no token {reuse!r}, which is named for image positions; leave it out, "
            f"and {IMAGE_PLACEHOLDER} is added after the last token"
        )
    return found


def check_unicode(text: str) -> None:
    """Raise DataError for half a surrogate pair, which JSON can represent and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has half a surrogate pair, {text[error.start]!r}, at character {error.start}, which is no Unicode; "
            f"repair or drop the record"
        ) from error

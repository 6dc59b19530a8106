"""Tokenizer on sentencepiece: text to ids with character spans, ids to text.

Reproduces LLaMA's slow tokenizer in its legacy form (transformers 4.31, `legacy=True`), which ShareGPT4V and LLaVA were
trained with.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import sentencepiece

from megatron_share4v.errors import DataError

WORD_START = "\u2581"  # sentencepiece's symbol for a space


class Tokenizer:
    """A sentencepiece `tokenizer.model`. Can be pickled. Raises DataError when the file is missing or not usable.

    Legacy rule: a text is split at its special tokens (`<s>`, `</s>`, `<unk>` and other control pieces of the model,
    written out), and each part is tokenised separately with sentencepiece's leading space; "</s>USER:" continues with
    "▁USER".

    bos_id, eos_id, pad_id: of `<s>`, `</s>` and `<unk>` (LLaMA has no padding token: <unk>, 0, is used).
    vocab_size: pieces in the model. max_piece_length: characters of the longest one. fingerprint: sha256 of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        content = _read(self.path)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._model = _load(content, self.path)
        self.bos_id, self.eos_id, self.pad_id = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(
                f"tokenizer {self.path}: has no <s> or no </s>; use the tokenizer.model of a LLaMA-type language model"
            )
        self.vocab_size = self._model.get_piece_size()
        special = [i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self._special = {self._model.id_to_piece(i): i for i in special}
        self._special_ids = frozenset(special)
        self.max_piece_length = max(len(self._model.id_to_piece(i)) for i in range(self.vocab_size))
        self._cut = re.compile(
            f"({'|'.join(re.escape(piece) for piece in sorted(self._special, key=len, reverse=True))})"
        )

    @property
    def special_pieces(self) -> frozenset[str]:
        """Names of the special tokens, which `encode` finds in a text."""
        return frozenset(self._special)

    def encode(self, text: str) -> list[int]:
        """Encode `text` without a leading <s>. Raises DataError for a text that is not valid Unicode."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode `text`; return the ids and, for each, its half-open span of characters.

        The leading space that sentencepiece adds has no character: a token of it alone has an empty span, at the start
        of its part. When a character is encoded as several byte tokens, the last has its span, the others an empty one
        at its start.
        """
        check_unicode(text)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for part in self._cut.split(text):
            stop = start + len(part)
            if part in self._special:
                ids.append(self._special[part])
                spans.append((start, stop))
            else:
                mapping = self._model.encode(part, return_type="offset_mapping")
                ids += mapping["ids"]
                spans += [(start + begin, start + end) for begin, end in mapping["offsets"]]
            start = stop
        return ids, spans

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode `ids`, dropping special tokens; without `skip_special` they are written out, which inverts encode.

        Bytes that do not (yet) form a UTF-8 character become U+FFFD.
        """
        if skip_special:
            return self._decode(i for i in ids if i not in self._special_ids)
        return "".join(self._decoded_runs(ids))

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token adds after other text: one byte of a character, or a special token's name."""
        piece = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])
        return (piece if token_id in self._special_ids else piece.replace(WORD_START, " ")).encode()

    def _decoded_runs(self, ids: Iterable[int]) -> Iterator[str]:
        for is_special, group in groupby(ids, key=self._special_ids.__contains__):
            run = list(group)
            yield "".join(self._model.id_to_piece(i) for i in run) if is_special else self._decode(run)

    def _decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        strangers = [i for i in ids if not 0 <= i < self.vocab_size]
        assert not strangers, f"ids {strangers[:5]} are not among the {self.vocab_size} pieces of {self.path}"
        return self._model.decode(ids)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {path}: cannot be read ({error.strerror}); give the path of a sentencepiece tokenizer.model, "
            f"as it lies beside the "
            "weights of the language model"
        ) from error


def _load(content: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise DataError(
            f"tokenizer {path}: is not a sentencepiece model, or is damaged ({len(content)} bytes); a LLaMA "
            f"tokenizer.model has about 500 kB. "
            "Fetch it again (a Git LFS pointer is not the file)"
        ) from error
    return model


def check_unicode(text: str) -> None:
    """Raise DataError for half a surrogate pair, which JSON can represent and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has half a surrogate pair, {text[error.start]!r}, at character {error.start}, which is no Unicode; "
            f"repair or drop the record"
        ) from error

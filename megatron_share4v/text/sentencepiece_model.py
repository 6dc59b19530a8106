"""Record of a sentencepiece `tokenizer.model` file: its pieces, and its tokenisation settings.

Parses the protobuf fields directly: sentencepiece's message classes need protobuf and clash with the copy that
transformers registers. tokenizer.py does the tokenising.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.tokenizer_config import TokenizerSettings


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """TrainerSpec.ModelType."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class SentencePiece:
    """One vocabulary entry; BPE applies the possible merge with the highest score first."""

    text: str
    score: float
    kind: PieceType


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """Vocabulary (`pieces` by id) and the fields of TrainerSpec and NormalizerSpec with their defaults."""

    pieces: tuple[SentencePiece, ...]
    bos_id: int
    eos_id: int
    unk_id: int
    model_type: ModelType = ModelType.UNIGRAM
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def bos(self) -> str:
        """Piece at the start of every text."""
        return self.pieces[self.bos_id].text

    @property
    def eos(self) -> str:
        """Piece at the end of an answer."""
        return self.pieces[self.eos_id].text

    @property
    def unk(self) -> str:
        """Piece for unknown text."""
        return self.pieces[self.unk_id].text


# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_SUFFIX, _BYTE_FALLBACK = 3, 24, 35  # TrainerSpec
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5  # NormalizerSpec
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3  # SentencePiece


def read_sentencepiece_model(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Read a model file. Raises DataError, as Tokenizer does, when it is missing or not usable."""
    tokenizer = SentencePieceTokenizer(path, settings=TokenizerSettings())  # of the file alone
    pieces: list[SentencePiece] = []
    trainer, normalizer = _Message(), _Message()
    for number, value in _parse_fields(Path(path).read_bytes()):
        if number not in (_PIECES, _TRAINER, _NORMALIZER):
            continue
        assert isinstance(value, bytes), f"field {number} of {path} is not a message"
        if number == _PIECES:
            pieces.append(_parse_piece(value))
        else:
            (trainer if number == _TRAINER else normalizer).update(value)
    assert len(pieces) == tokenizer.pieces, f"read {len(pieces)} pieces of {tokenizer.pieces} from {path}"
    return SentencePieceModel(
        pieces=tuple(pieces),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.pad_id,
        model_type=ModelType(trainer.integer(_MODEL_TYPE, ModelType.UNIGRAM)),
        byte_fallback=bool(trainer.integer(_BYTE_FALLBACK, False)),
        treat_whitespace_as_suffix=bool(trainer.integer(_WHITESPACE_SUFFIX, False)),
        precompiled_charsmap=normalizer.content(_CHARSMAP, b""),
        add_dummy_prefix=bool(normalizer.integer(_DUMMY_PREFIX, True)),
        remove_extra_whitespaces=bool(normalizer.integer(_REMOVE_WHITESPACES, True)),
        escape_whitespaces=bool(normalizer.integer(_ESCAPE_WHITESPACES, True)),
    )


class _Message:
    """Fields of one protobuf message by number; the last value of a repeated field is kept."""

    def __init__(self, message: bytes = b"") -> None:
        self._fields: dict[int, int | bytes] = {}
        self.update(message)

    def update(self, message: bytes) -> None:
        """Set the fields of another encoded message."""
        self._fields |= dict(_parse_fields(message))

    def integer(self, number: int, default: int) -> int:
        """Return a varint field."""
        value = self._fields.get(number, default)
        assert isinstance(value, int), f"field {number} is not a varint"
        return value

    def content(self, number: int, default: bytes) -> bytes:
        """Return a field of bytes, text or a float."""
        value = self._fields.get(number, default)
        assert isinstance(value, bytes), f"field {number} is a varint"
        return value


def _parse_piece(message: bytes) -> SentencePiece:
    """Parse one vocabulary entry."""
    fields = _Message(message)
    [score] = struct.unpack("<f", fields.content(_PIECE_SCORE, bytes(4)))
    kind = PieceType(fields.integer(_PIECE_TYPE, PieceType.NORMAL))
    return SentencePiece(text=fields.content(_PIECE_TEXT, b"").decode("utf-8"), score=score, kind=kind)


def _parse_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message in file order: int for varints, bytes for everything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        value: int | bytes
        if wire_type == 0:
            value, at = _varint(message, at)
        else:
            assert wire_type in (1, 2, 5), f"wire type {wire_type} at byte {at}"
            size, at = _varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Decode the varint at byte `at`; return it and the next position."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at

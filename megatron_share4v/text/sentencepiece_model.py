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

from megatron_share4v.text.tokenizer import Tokenizer


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
_TRAINER_FIELDS = {3: ("model_type", ModelType), 24: ("treat_whitespace_as_suffix", bool), 35: ("byte_fallback", bool)}
_NORMALIZER_FIELDS = {
    2: ("precompiled_charsmap", bytes), 3: ("add_dummy_prefix", bool), 4: ("remove_extra_whitespaces", bool), 5: ("escape_whitespaces", bool)
}  # fmt: skip


def read_sentencepiece_model(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Read a model file. Raises DataError, as Tokenizer does, when it is missing or not usable."""
    tokenizer = Tokenizer(path)
    pieces: list[SentencePiece] = []
    settings: dict[str, object] = {}
    for number, value in _fields(Path(path).read_bytes()):
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number in (_TRAINER, _NORMALIZER):
            known = _TRAINER_FIELDS if number == _TRAINER else _NORMALIZER_FIELDS
            for inner, content in _fields(value):
                if inner in known:
                    name, kind = known[inner]
                    settings[name] = kind(content)
    assert len(pieces) == tokenizer.vocab_size, f"read {len(pieces)} pieces of {tokenizer.vocab_size} from {path}"
    return SentencePieceModel(
        pieces=tuple(pieces), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, unk_id=tokenizer.pad_id, **settings
    )


def _piece(message: bytes) -> SentencePiece:
    fields = dict(_fields(message))
    [score] = struct.unpack("<f", fields.get(2, bytes(4)))
    return SentencePiece(text=fields[1].decode("utf-8"), score=score, kind=PieceType(fields.get(3, PieceType.NORMAL)))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message in file order: int for varints, bytes for everything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
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

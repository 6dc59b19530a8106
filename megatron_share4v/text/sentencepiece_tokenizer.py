"""Tokenizer of a sentencepiece file: text to ids with character spans, ids to text.

Reproduces LLaMA's slow tokenizer in transformers, with which ShareGPT4V and LLaVA were trained, in each of the three
ways in which its versions tokenise the text after a special token (text/tokenizer_config.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import sentencepiece

from megatron_share4v.errors import DataError
from megatron_share4v.text.tokenizer import LAYOUT_TOKENS, Encoding, Tokenizer, check_unicode
from megatron_share4v.text.tokenizer_config import (
    LEGACY_RULE,
    PUBLISHED_RULE,
    TOKENIZER_CONFIG,
    AddedToken,
    TokenizerRule,
    TokenizerSettings,
    read_tokenizer_settings,
)

WORD_START = "\u2581"  # sentencepiece's symbol for a space
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec.add_dummy_prefix = false; protobuf merges it


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model`. Raises DataError when the file is missing or not usable.

    A text is split at its special tokens (`<s>`, `</s>`, `<unk>` and other control pieces of the model, written out)
    and at added tokens. The first part gets sentencepiece's leading space; the others follow `settings.rule`.

    settings: default: of the files beside `path`. bos_id, eos_id, unk_id: of `<s>`, `</s>` and `<unk>`. pad_id is
    unk_id: LLaMA has no padding token.
    """

    file_name = "tokenizer.model"
    class_name = "LlamaTokenizer"
    special_in_text = True
    bos_id: int
    pad_id: int
    unk_id: int
    rule: TokenizerRule

    def __init__(self, path: str | os.PathLike[str], *, settings: TokenizerSettings | None = None) -> None:
        self.path = Path(path)
        content = _read(self.path)
        self.settings = settings or read_tokenizer_settings(self.path)
        self._model = _load(content, self.path)
        self._bare = _load(content + _NO_DUMMY_PREFIX, self.path)
        self.eos_id, self.unk_id = self._model.eos_id(), self._model.unk_id()
        self.bos_id, self.pad_id = self._model.bos_id(), self.unk_id
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(
                f"tokenizer {self.path}: has no <s> or no </s>; use the tokenizer.model of a LLaMA-type language model"
            )
        self.pieces = self._model.get_piece_size()
        self.added = _after_pieces(self.settings.tokens, self._model, path=self.path)
        self.vocab_size = self.pieces + len(self.added)
        self.fingerprint = _fingerprint(content, self.added)
        special = [i for i in range(self.pieces) if self._model.is_control(i) or self._model.is_unknown(i)]
        self._special = {self._model.id_to_piece(i): i for i in special}
        self.special_ids = frozenset([*special, *(token.id for token in self.added if token.special)])
        self._names = {i: piece for piece, i in self._special.items()} | {token.id: token.text for token in self.added}
        marked = [token for token in self.settings.tokens if token.id < self.pieces and token.id not in special]
        found = [*marked, *(token for token in self.added if token.text not in LAYOUT_TOKENS)]
        self._cut_out = {token.text.strip(): token.id for token in found} | {token.text: token.id for token in found}
        self._cut_out |= self._special
        self.max_piece_length = max(
            *(len(self._model.id_to_piece(i)) for i in range(self.pieces)), *map(len, self._names.values())
        )
        self._cut = _cut_pattern(self._special, found)
        self.special_pieces = frozenset([*self._special, *(token.text for token in self.added if token.special)])
        self.rule = self.settings.rule
        self.states_rule = self.settings.stated

    def summary(self) -> str:
        """Describe the rule and where it comes from."""
        return f"rule {self.rule} ({self.settings.origin})"

    def files(self) -> Mapping[str, bytes]:
        """Return the model and the settings that it does not hold."""
        settings = self.settings.to_json(first_added=self.pieces)
        return {self.file_name: _read(self.path), TOKENIZER_CONFIG: settings.encode()}

    def token_id(self, name: str) -> int | None:
        """Return the id of the special piece or added token `name`; None without one."""
        return next((i for i, text in self._names.items() if text == name), None)

    def is_cut_out(self, token_id: int) -> bool:
        """Whether text is split at the token: a special piece or an added token."""
        return token_id in self._names

    def encode_with_offsets(self, text: str, *, continues: bool = False) -> Encoding:
        """Encode `text`; return the ids and, for each, its half-open span of characters.

        continues: other text stands before, so that the first part has no leading space.

        The token of a leading space alone has an empty span, at the start of its part. When a character is encoded as
        several byte tokens, the last has its span, the others an empty one at its start.
        """
        check_unicode(text)
        if self.rule != LEGACY_RULE:
            text = text.replace(WORD_START, " ")  # as transformers; "▁" is not whitespace beside an added token
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(self._cut.split(text)):
            if number % 2:
                token_id = self._cut_out.get(part)
                ids.append(self._cut_out[part.strip()] if token_id is None else token_id)
                spans.append((start, start + len(part)))
            elif part:
                starts = number == 0
                part_ids, part_spans = (
                    _encode(self._bare, part) if starts and continues else self._encode_part(part, first=starts)
                )
                ids += part_ids
                spans += [(start + begin, start + end) for begin, end in part_spans]
            start += len(part)
        return ids, spans

    def _encode_part(self, part: str, *, first: bool) -> Encoding:
        """Encode the text between two special tokens; spans are relative to it."""
        if first or self.rule == LEGACY_RULE or (self.rule == PUBLISHED_RULE and part[0] == " "):
            return _encode(self._model, part)
        if self.rule != PUBLISHED_RULE:
            return _encode(self._bare, part)
        ids, spans = _encode(self._model, part)
        piece = self._model.id_to_piece(ids[0])
        if not piece.startswith(WORD_START):
            return ids, spans
        if piece == WORD_START:
            return ids[1:], spans[1:]
        without = self._model.piece_to_id(piece[1:])
        if without != self.unk_id:
            return [without, *ids[1:]], spans
        # transformers 4.31 gives <unk> here, which official training masks; LLaMA's vocabulary has a piece for each
        # start of a turn.
        first_ids, first_spans = _encode(self._bare, part[: spans[0][1]])
        return [*first_ids, *ids[1:]], [*first_spans, *spans[1:]]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode `ids`, dropping special tokens; without `skip_special` they are written out, which inverts encode.

        Bytes that do not (yet) form a UTF-8 character become U+FFFD.
        """
        kept = [i for i in ids if i not in self.special_ids] if skip_special else list(ids)
        return "".join(self._decoded_runs(kept))

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token adds after other text: one byte of a character, or a special token's name."""
        if token_id in self._names:
            return self._names[token_id].encode()
        piece = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(WORD_START, " ").encode()

    def _decoded_runs(self, ids: Sequence[int]) -> Iterator[str]:
        at_start = True  # <s> does not end the start
        for is_named, group in groupby(ids, key=self._names.__contains__):
            run = list(group)
            if is_named:
                yield "".join(self._names[i] for i in run)
                at_start = at_start and run == [self.bos_id]
            else:
                has_space = at_start or self.rule in (LEGACY_RULE, PUBLISHED_RULE)
                yield self._decode(self._model if has_space else self._bare, run)
                at_start = False

    def _decode(self, model: sentencepiece.SentencePieceProcessor, ids: list[int]) -> str:
        strangers = [i for i in ids if not 0 <= i < self.pieces]
        assert not strangers, f"ids {strangers[:5]} are not among the {self.vocab_size} tokens of {self.path}"
        return model.decode(ids)


def _encode(model: sentencepiece.SentencePieceProcessor, text: str) -> Encoding:
    mapping = model.encode(text, return_type="offset_mapping")
    return mapping["ids"], mapping["offsets"]


def _after_pieces(
    tokens: Sequence[AddedToken], model: sentencepiece.SentencePieceProcessor, *, path: Path
) -> tuple[AddedToken, ...]:
    """Return the added tokens after the model's pieces, without those of the layout llava-hf at the end.

    Raises DataError unless they follow the pieces without a gap, each with a text of its own.
    """
    pieces = model.get_piece_size()
    for token in tokens:
        if token.id < pieces and model.id_to_piece(token.id) != token.text:
            raise DataError(
                f"tokenizer {path}: {token.text!r} has id {token.id} in added_tokens.json or tokenizer_config.json "
                f"beside it, which is the piece {model.id_to_piece(token.id)!r}; use the files of one model"
            )
    added = [token for token in tokens if token.id >= pieces]
    while added and added[-1].text in LAYOUT_TOKENS:
        added.pop()
    for expected, token in enumerate(added, start=pieces):
        if token.id != expected:
            raise DataError(
                f"tokenizer {path}: the added token {token.text!r} has id {token.id}, but the next free one is "
                f"{expected} ({pieces} pieces in the file); correct added_tokens.json and tokenizer_config.json "
                "beside it"
            )
        if not token.text.strip() or token.text in [other.text for other in added if other is not token]:
            raise DataError(
                f"tokenizer {path}: the added token {token.text!r} (id {token.id}) is blank or has two ids; correct "
                "added_tokens.json and tokenizer_config.json beside it"
            )
    return tuple(added)


def _cut_pattern(special: Iterable[str], added: Sequence[AddedToken]) -> re.Pattern[str]:
    """Return the pattern at which a text is split: the longest token first, with the whitespace that belongs to it."""
    patterns = {piece: re.escape(piece) for piece in special}
    for token in added:
        after = re.escape(token.text) + r"\s*" * token.rstrip
        # One attempt per run of whitespace: the possessive run starts where no whitespace precedes.
        patterns[token.text] = rf"(?<!\s)\s++{after}|{after}" if token.lstrip else after
    return re.compile(f"({'|'.join(patterns[text] for text in sorted(patterns, key=len, reverse=True))})")


def _fingerprint(content: bytes, added: Sequence[AddedToken]) -> str:
    digest = hashlib.sha256(content)
    if added:
        digest.update(json.dumps([asdict(token) for token in added]).encode())
    return digest.hexdigest()


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

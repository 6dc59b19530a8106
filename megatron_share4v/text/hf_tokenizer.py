"""Tokenizer of Hugging Face's `tokenizer.json` (Llama 3, Qwen): text to ids with character spans, ids to text.

The library `tokenizers` does the work. What it leaves open is settled here: <image> is never a token, no bos_id is
added, spans cover the text, and a character split over several tokens is decoded when it is complete.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from megatron_share4v.errors import DataError
from megatron_share4v.text.template import IMAGE_PLACEHOLDER
from megatron_share4v.text.tokenizer import LAYOUT_TOKENS, Encoding, Tokenizer, check_unicode
from megatron_share4v.text.tokenizer_config import (
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    AddedToken,
    read_json_object,
)

WORD_START = "\u2581"  # symbol for a space in vocabularies that were sentencepiece's
SETTINGS_OF_A_MODEL = ("chat_template", "auto_map", "processor_class")
"""Keys of tokenizer_config.json that describe the model around the tokenizer, which training changes."""
_HIDDEN = "\0{}\0"  # name of a token that no text is to contain
_MOST_COMPOSED = 4  # characters that a normalizer joins into one


class HfTokenizer(Tokenizer):
    """A `tokenizer.json`, with the tokens that tokenizer_config.json beside it names as end, padding and start.

    bos_id: id that the file's post-processor puts first, unless `add_bos_token` is stated. <image> and <pad> after all
    other tokens, as an export adds them, do not count. config: content of tokenizer_config.json, without the settings
    of a model. Raises DataError when a file is missing, damaged, or contradicts the other.
    """

    file_name = "tokenizer.json"
    special_in_text = False
    rule = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        content = _read(self.path)
        self.config = _read_config(self.path.parent)
        self.class_name = self.config.get("tokenizer_class", "PreTrainedTokenizerFast")
        named = _read_added_tokens(content["added_tokens"], self.path)
        self._own_image = next((token.id for token in named if token.text == IMAGE_PLACEHOLDER), None)
        tokens = _drop_layout_tokens(content, named)
        self._tokenizer = _load(content, self.path)
        self.bos_id = self._find_bos()  # of the post-processor, which the line below removes
        content |= {"post_processor": None, "padding": None, "truncation": None}
        self._tokenizer = _load(content, self.path)
        bare = _without_leading_space(content)
        self._bare = self._tokenizer if bare == content else _load(bare, self.path)
        schemes = [part.get("prepend_scheme") for part in _parts(content["pre_tokenizer"], "pretokenizers")]
        self.space_after_image = "first" not in schemes
        self._is_byte_level = "ByteLevel" in [part["type"] for part in _parts(content["decoder"], "decoders")]
        base: Mapping[str, int] = content["model"]["vocab"]
        self._names = {token.id: token.text for token in tokens}
        self.special_ids = frozenset(token.id for token in tokens if token.special)
        self.special_pieces = frozenset(token.text for token in tokens if token.special) - {IMAGE_PLACEHOLDER}
        self.pieces = max(base.values(), default=-1) + 1
        self.added = tuple(token for token in tokens if token.id >= self.pieces)
        self.vocab_size = max([self.pieces - 1, *self._names]) + 1
        self._check_ids(tokens)
        eos = self._find("eos_token")
        if eos is None:
            raise DataError(
                f"tokenizer {self.path}: no eos_token is stated in {TOKENIZER_CONFIG} beside it; copy that file of the "
                "model as well"
            )
        self.eos_id, self.pad_id, self.unk_id = eos, self._find("pad_token"), self._find("unk_token")
        self.max_piece_length = max(map(len, [*base, *self._names.values()])) * (
            1 if content.get("normalizer") is None else _MOST_COMPOSED
        )
        self.fingerprint = _fingerprint(content, self.bos_id)

    def summary(self) -> str:
        """Describe the size and the token at the start."""
        start = "no token" if self.bos_id is None else repr(self._names[self.bos_id])
        return f"{self.vocab_size} tokens of a tokenizer.json, {start} at the start"

    def files(self) -> Mapping[str, bytes]:
        """Return tokenizer.json unchanged, and tokenizer_config.json without the settings of a model."""
        config = json.dumps(self.config, indent=1, ensure_ascii=False) + "\n"
        return {self.file_name: self.path.read_bytes(), TOKENIZER_CONFIG: config.encode()}

    def token_id(self, name: str) -> int | None:
        """Return the id of the added token `name`; None without one. Finds an <image> inside the vocabulary too."""
        if name == IMAGE_PLACEHOLDER:
            return self._own_image
        return next((i for i, text in self._names.items() if text == name), None)

    def is_cut_out(self, token_id: int) -> bool:
        """Whether text is split at the token: an added token."""
        return token_id in self._names

    def encode_with_offsets(self, text: str, *, continues: bool = False) -> Encoding:
        """Encode `text`; return the ids and, for each, its half-open span of characters; the spans cover the text.

        continues: other text stands before: a leading space is not added. All tokens of one character have its span.
        """
        check_unicode(text)
        encoded = (self._bare if continues else self._tokenizer).encode(text, add_special_tokens=False)
        return encoded.ids, list(_cover(encoded.offsets, len(text)))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode `ids`, dropping special tokens; without `skip_special` they are written out.

        Bytes that do not (yet) form a UTF-8 character become U+FFFD.
        """
        kept = [i for i in ids if not (skip_special and i in self.special_ids)]
        strangers = [i for i in kept if not 0 <= i < self.vocab_size]
        assert not strangers, f"ids {strangers[:5]} are not among the {self.vocab_size} tokens of {self.path}"
        if self._is_byte_level:
            return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token adds after other text: part of a character, or a special token's name."""
        if token_id in self._names:
            return self._names[token_id].encode()
        name = self._tokenizer.id_to_token(token_id) or ""
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in name) if _BYTES.keys() >= {*name} else name.encode()
        if len(name) == len("<0x00>") and name.startswith("<0x"):
            return bytes([int(name[3:-1], 16)])
        return name.replace(WORD_START, " ").encode()

    def _find(self, key: str) -> int | None:
        """Return the id of the token that tokenizer_config.json names under `key`; None where it names none."""
        stated = self.config.get(key)
        name = stated.get("content") if isinstance(stated, dict) else stated
        if name is None:
            return None
        if not isinstance(name, str):
            raise DataError(
                f"tokenizer {self.path}: {key} in {TOKENIZER_CONFIG} beside it is {name!r}, not the name of a token; "
                "use the file as published"
            )
        found = self._tokenizer.token_to_id(name)
        if found is None and name in LAYOUT_TOKENS:
            return None
        if found is None:
            raise DataError(
                f"tokenizer {self.path}: {key} {name!r} in {TOKENIZER_CONFIG} beside it is no token of the file; use "
                "the files of one model"
            )
        return found

    def _find_bos(self) -> int | None:
        stated = self.config.get("add_bos_token")
        if isinstance(stated, bool):
            return self._find("bos_token") if stated else None
        first = self._tokenizer.encode("").ids
        return first[0] if first and first[0] != self._find("eos_token") else None

    def _check_ids(self, tokens: Iterable[AddedToken]) -> None:
        """Raise DataError for ids with a gap, which the library moves, and for tokens named in one file only."""
        for token in tokens:
            name = _HIDDEN.format(token.text) if token.text == IMAGE_PLACEHOLDER else token.text
            found = self._tokenizer.token_to_id(name)
            if found != token.id:
                raise DataError(
                    f"tokenizer {self.path}: the added token {token.text!r} has id {token.id}, but gets {found}: the "
                    "ids of added tokens follow the vocabulary without a gap; use the file as published"
                )
        decoder = self.config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict) or not all(isinstance(entry, dict) for entry in decoder.values()):
            raise DataError(
                f"tokenizer {self.path}: added_tokens_decoder in {TOKENIZER_CONFIG} beside it is not an object of "
                "added tokens by id; use the file as published"
            )
        for number, entry in decoder.items():
            name = entry.get("content")
            if name not in LAYOUT_TOKENS and self._names.get(int(number) if number.isdecimal() else -1) != name:
                raise DataError(
                    f"tokenizer {self.path}: {TOKENIZER_CONFIG} beside it has the added token {name!r} with id "
                    f"{number}, which the file does not have; use the files of one model"
                )


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character with which byte-level vocabularies write bytes.

    Visible bytes of Latin-1 are written as they are, the others as the characters from U+0100 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + number): byte for number, byte in enumerate(hidden)}


_BYTES = _byte_characters()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"tokenizer {path}: cannot be read ({error.strerror}); give the path of a tokenizer.json or a "
            "sentencepiece tokenizer.model, as it lies beside the weights of the language model"
        ) from error
    except ValueError as error:
        raise DataError(
            f"tokenizer {path}: is no JSON ({error}); copy it again (a Git LFS pointer is not the file)"
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise DataError(
            f"tokenizer {path}: has no model with a vocabulary by name, so it is no tokenizer.json of a language "
            "model; give the file beside the weights"
        )
    entries = content.get("added_tokens") or []
    return {"pre_tokenizer": None, "decoder": None, **content, "added_tokens": entries}


def _read_config(directory: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; special_tokens_map.json has what it lacks."""
    named = read_json_object(directory / SPECIAL_TOKENS) or {}
    config = {**named, **(read_json_object(directory / TOKENIZER_CONFIG) or {})}
    return {key: value for key, value in config.items() if key not in SETTINGS_OF_A_MODEL}


def _load(content: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library has no narrower class
        raise DataError(
            f"tokenizer {path}: tokenizers {tokenizers.__version__} cannot read it ({error}); copy it again, or "
            "install the version that wrote it"
        ) from error


def _read_added_tokens(entries: Any, path: Path) -> list[AddedToken]:
    """Return the added tokens of a tokenizer.json, by id. Raises DataError for entries without a name and an id."""
    tokens = []
    for entry in entries if isinstance(entries, list) else [entries]:
        name, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(number, int):
            raise DataError(
                f"tokenizer {path}: added_tokens has {entry!r}, which is not an added token with its content and id; "
                "use the file as published"
            )
        flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "special")}
        tokens.append(AddedToken(name, number, **flags))
    return sorted(tokens, key=lambda token: token.id)


def _drop_layout_tokens(content: dict[str, Any], tokens: list[AddedToken]) -> list[AddedToken]:
    """Remove <image> and <pad> at the end from a tokenizer.json; hide an <image> inside. Returns the tokens left."""
    kept = list(tokens)
    for tail in (LAYOUT_TOKENS, LAYOUT_TOKENS[:1]):
        if tuple(token.text for token in kept[-len(tail) :]) == tail:
            kept = kept[: -len(tail)]
            break
    ids, model = {token.id for token in kept}, content["model"]
    dropped = {token.text for token in tokens if token.id not in ids}
    hidden = {IMAGE_PLACEHOLDER: _HIDDEN.format(IMAGE_PLACEHOLDER)}
    content["added_tokens"] = [
        {**entry, "content": hidden.get(entry["content"], entry["content"])}
        for entry in content["added_tokens"]
        if entry["id"] in ids
    ]
    content["model"] = {
        **model,
        "vocab": {hidden.get(name, name): i for name, i in model["vocab"].items() if name not in dropped},
    }
    return kept


def _without_leading_space(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that adds no space before the text."""
    bare: dict[str, Any] = copy.deepcopy({**content, "model": None}) | {"model": content["model"]}
    for part in _parts(bare["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace":
            part |= {"prepend_scheme": "never"}
        if "add_prefix_space" in part:
            part |= {"add_prefix_space": False}
    normalizer = bare.get("normalizer")
    left = [part for part in _parts(normalizer, "normalizers") if part["type"] != "Prepend"]
    if left != list(_parts(normalizer, "normalizers")):
        bare["normalizer"] = {"type": "Sequence", "normalizers": left}
    return bare


def _parts(step: dict[str, Any] | None, members: str) -> Iterator[dict[str, Any]]:
    """Yield a step of a tokenizer.json, or the steps of its sequence."""
    if step is not None:
        yield from step[members] if step["type"] == "Sequence" else [step]


def _cover(offsets: list[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """Extend each span up to the next one: normalisation can leave characters without a token."""
    for (start, stop), (following, _) in pairwise([*offsets, (length, length)]):
        yield start, max(stop, following) if following > start else stop


def _fingerprint(content: Mapping[str, Any], bos_id: int | None) -> str:
    model = dict(content["model"])
    if isinstance(model.get("merges"), list):  # newer files have pairs in place of strings
        model["merges"] = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    described = {**content, "model": model, "bos_id": bos_id}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

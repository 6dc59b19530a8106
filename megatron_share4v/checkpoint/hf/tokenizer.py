"""Convert a sentencepiece model to Hugging Face's `tokenizer.json` and `tokenizer_config.json`, with <image> and <pad>
added.

Ids equal those of text/tokenizer.py. transformers' own conversion drops the leading space after an image: it makes "▁"
part of the pre-tokenizer. Writes no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_share4v.errors import ConversionError
from megatron_share4v.text.sentencepiece_model import (
    ModelType,
    PieceType,
    SentencePiece,
    SentencePieceModel,
    read_sentencepiece_model,
)
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

PAD = "<pad>"
SPACE = "▁"
NEW_TOKENS = (IMAGE_PLACEHOLDER, PAD)


@dataclass(frozen=True)
class ExportedTokenizer:
    """A sentencepiece model with <image> and <pad> as the two ids after the model's `vocab_size`."""

    model: SentencePieceModel
    vocab_size: int

    @property
    def image_id(self) -> int:
        """Id of <image>, the placeholder of every image position."""
        return self.vocab_size

    @property
    def pad_id(self) -> int:
        """Id of <pad>."""
        return self.vocab_size + 1

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Return the tokens that text is split at first, by id: the model's special pieces and the two new tokens."""
        special = {
            i: piece.text
            for i, piece in enumerate(self.model.pieces)
            if piece.kind in (PieceType.UNKNOWN, PieceType.CONTROL)
        }
        rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            i: {"content": text, **rules}
            for i, text in {**special, self.image_id: IMAGE_PLACEHOLDER, self.pad_id: PAD}.items()
        }

    def tokenizer_json(self) -> dict[str, Any]:
        """Return the content of tokenizer.json, read by the library `tokenizers`."""
        without_first_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, **token} for i, token in self.added_tokens().items()],
            # As sentencepiece, for each part between special tokens: prepend a space, and replace spaces by "▁".
            "normalizer": _sequence("normalizers", {"type": "Prepend", "prepend": SPACE}, _replacement(" ", SPACE)),
            "pre_tokenizer": None,
            "post_processor": self._post_processor(),
            "decoder": _sequence(
                "decoders", _replacement(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, without_first_space
            ),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self.model.unk,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": self.model.byte_fallback,
                "ignore_merges": False,
                "vocab": self._vocabulary(),
                "merges": list(_merges(self.model.pieces)),
            },
        }

    def tokenizer_config(self, *, max_length: int) -> dict[str, Any]:
        """Return the content of tokenizer_config.json of a llava-hf model, with left padding for generation."""
        return {
            **_class_settings(self.model, max_length=max_length),
            "added_tokens_decoder": {str(i): token for i, token in self.added_tokens().items()},
            # A dictionary by name: transformers 4 creates attributes from it and cannot read a list.
            "extra_special_tokens": {"image_token": IMAGE_PLACEHOLDER},
            "image_token": IMAGE_PLACEHOLDER,
            "pad_token": PAD,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
        }

    def _post_processor(self) -> dict[str, Any]:
        bos = self.model.bos
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [self.model.bos_id], "tokens": [bos]}},
        }

    def _vocabulary(self) -> dict[str, int]:
        """Return every token up to <pad>; model rows without a piece get names that no text tokenizes to."""
        vocabulary = {piece.text: i for i, piece in enumerate(self.model.pieces)}
        vocabulary |= {f"<unused_{i}>": i for i in range(len(self.model.pieces), self.vocab_size)}
        return {**vocabulary, IMAGE_PLACEHOLDER: self.image_id, PAD: self.pad_id}


def read_tokenizer(path: Path, *, vocab_size: int) -> ExportedTokenizer:
    """Read the sentencepiece file of a model with `vocab_size` tokens.

    Raises DataError when the file is missing or damaged; ConversionError when it has more pieces than the model has
    rows, already has <image> or <pad>, or tokenizes in a way that tokenizer.json cannot reproduce.
    """
    model = read_sentencepiece_model(path)
    problems = list(_problems(model, vocab_size))
    if problems:
        raise ConversionError(
            f"tokenizer {path} cannot be exported: {'; '.join(problems)}. "
            "Give the tokenizer.model that the model was trained with"
        )
    return ExportedTokenizer(model=model, vocab_size=vocab_size)


def legacy_tokenizer_config(model: SentencePieceModel, *, max_length: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json of a ShareGPT4V model: slow tokenizer, right padding with <unk>."""
    return {
        **_class_settings(model, max_length=max_length),
        "pad_token": model.unk,
        "padding_side": "right",
        "use_fast": False,
    }


def special_tokens_map(model: SentencePieceModel, *, pad: str) -> dict[str, str]:
    """Return the content of special_tokens_map.json."""
    return {"bos_token": model.bos, "eos_token": model.eos, "pad_token": pad, "unk_token": model.unk}


def _class_settings(model: SentencePieceModel, *, max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": model.bos,
        "eos_token": model.eos,
        "unk_token": model.unk,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "sp_model_kwargs": {},
    }


def _problems(model: SentencePieceModel, vocab_size: int) -> Iterator[str]:
    if len(model.pieces) > vocab_size:
        yield (
            f"it has {len(model.pieces)} pieces, the model's vocabulary is too small: "
            f"model.language.vocab_size is {vocab_size}"
        )
    if model.model_type != ModelType.BPE:
        yield f"it is of type {model.model_type.name}, LLaMA's are BPE"
    if model.treat_whitespace_as_suffix or model.precompiled_charsmap or model.remove_extra_whitespaces:
        yield "it changes the text before tokenizing (normalisation, extra or trailing whitespace), LLaMA's do not"
    if not (model.add_dummy_prefix and model.escape_whitespaces):
        yield "it adds no leading space or does not write spaces as ▁, LLaMA's do"
    texts = {piece.text for piece in model.pieces}
    for token in NEW_TOKENS:
        if token in texts:
            yield f"it has a piece {token} already, which the export adds"
    for kind in (PieceType.USER_DEFINED, PieceType.UNUSED):
        found = [piece.text for piece in model.pieces if piece.kind == kind]
        if found:
            yield f"{len(found)} pieces are {kind.name.lower()} ({found[0]!r}), LLaMA's are not"


def _merges(pieces: tuple[SentencePiece, ...]) -> Iterator[str]:
    """Yield the BPE merges (pairs of pieces that make a piece) in rank order.

    Sentencepiece ranks the merged piece, tokenizer.json the pairs; the order of the pairs of one piece affected no
    tested text.
    """
    normal = {piece.text for piece in pieces if piece.kind == PieceType.NORMAL}
    for piece in sorted((piece for piece in pieces if piece.kind == PieceType.NORMAL), key=lambda piece: -piece.score):
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in normal and right in normal:
                yield f"{left} {right}"


def _sequence(members: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", members: list(steps)}


def _replacement(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}

"""Convert a sentencepiece model to Hugging Face's `tokenizer.json` and `tokenizer_config.json`, with <image> and <pad>
added.

Ids equal those of text/sentencepiece_tokenizer.py; with the rule transformers-4.31, after a special token, for the
texts that the template writes there. transformers' own conversion drops the leading space after an image: it makes "▁"
part of the pre-tokenizer. tokenizer_json.py exports tokenizers that have a tokenizer.json. Writes no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_share4v.checkpoint.hf.tokenizer_json import ExportedHfTokenizer, export_hf_tokenizer, layout_token_ids
from megatron_share4v.errors import ConversionError
from megatron_share4v.text.hf_tokenizer import HfTokenizer
from megatron_share4v.text.sentencepiece_model import (
    ModelType,
    PieceType,
    SentencePiece,
    SentencePieceModel,
    read_sentencepiece_model,
)
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import IMAGE_PLACEHOLDER, Template
from megatron_share4v.text.tokenizer import LAYOUT_TOKENS, PAD, Tokenizer
from megatron_share4v.text.tokenizer_config import LEGACY_RULE, PUBLISHED_RULE, RULE_KEY, AddedToken, TokenizerRule

SPACE = "▁"


@dataclass(frozen=True, kw_only=True)
class ExportedTokenizer:
    """A sentencepiece model with <image> and <pad>, whose ids are `layout_ids`.

    added: tokens after the pieces. openings: for the rule transformers-4.31, the texts with which a template goes on
    after a special token, each as (first token, rest).
    """

    model: SentencePieceModel
    path: Path
    layout_ids: Mapping[str, int]
    rule: TokenizerRule = LEGACY_RULE
    added: tuple[AddedToken, ...] = ()
    openings: tuple[tuple[str, str], ...] = ()

    @property
    def image_id(self) -> int:
        """Id of <image>, the placeholder of every image position."""
        return self.layout_ids[IMAGE_PLACEHOLDER]

    @property
    def pad_id(self) -> int:
        """Id of <pad>."""
        return self.layout_ids[PAD]

    @property
    def bos_id(self) -> int:
        """Id that starts every text."""
        return self.model.bos_id

    @property
    def eos_id(self) -> int:
        """Id that ends a text."""
        return self.model.eos_id

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer, for generation."""
        return [self.model.eos_id]

    @property
    def copied(self) -> tuple[Path, ...]:
        """Files that are copied: the sentencepiece model."""
        return (self.path,)

    def files(self, *, max_length: int) -> dict[str, dict[str, Any]]:
        """Return the contents of the tokenizer's other files by name; max_length: positions of the model."""
        return {
            "tokenizer.json": self.tokenizer_json(),
            "tokenizer_config.json": self.tokenizer_config(max_length=max_length),
            "special_tokens_map.json": {
                **special_tokens_map(self.model, pad=PAD),
                "image_token": IMAGE_PLACEHOLDER,
            },
        }

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Return the tokens that text is split at first, by id: special pieces, added tokens, <image> and <pad>.

        Those between which text follows on without a leading space are found in the normalised text, for which the
        leading space is written once.
        """
        special = [
            AddedToken(piece.text, i, special=True)
            for i, piece in enumerate(self.model.pieces)
            if piece.kind in (PieceType.UNKNOWN, PieceType.CONTROL)
        ]
        added = [token for token in self.added if token.text not in LAYOUT_TOKENS]
        found = {token.id: {**token.to_hf(), "normalized": self.rule != LEGACY_RULE} for token in [*special, *added]}
        new = {i: AddedToken(text, i, special=True).to_hf() for text, i in self.layout_ids.items()}
        return dict(sorted((found | new).items()))

    def tokenizer_json(self) -> dict[str, Any]:
        """Return the content of tokenizer.json, read by the library `tokenizers`."""
        without_first_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, **token} for i, token in self.added_tokens().items()],
            "normalizer": self._normalizer(),
            "pre_tokenizer": self._pre_tokenizer(),
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
            **_class_settings(self.model, rule=self.rule, max_length=max_length),
            "added_tokens_decoder": {str(i): token for i, token in self.added_tokens().items()},
            # A dictionary by name: transformers 4 creates attributes from it and cannot read a list.
            "extra_special_tokens": {"image_token": IMAGE_PLACEHOLDER},
            "image_token": IMAGE_PLACEHOLDER,
            "pad_token": PAD,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
        }

    def _normalizer(self) -> dict[str, Any]:
        """Prepend a space and replace spaces by "▁", as sentencepiece.

        The rule legacy does so for each part between special tokens. Else special tokens are part of the text here:
        only its start, after a <s>, gets the space.
        """
        prepend, escape = {"type": "Prepend", "prepend": SPACE}, _replacement(" ", SPACE)
        if self.rule == LEGACY_RULE:
            return _sequence("normalizers", prepend, escape)
        found = [token for token in self.added_tokens().values() if token["normalized"]]
        strip = [
            _regex(rf"\s*{text}\s*" if token["lstrip"] and token["rstrip"] else rf"\s*{text}", token["content"])
            if token["lstrip"]
            else _regex(rf"{text}\s*", token["content"])
            for token in found
            if token["lstrip"] or token["rstrip"]
            for text in [re.escape(token["content"])]
        ]
        names = "|".join(re.escape(token["content"]) for token in found)
        bos = re.escape(self.model.bos)
        steps = [
            _replacement(SPACE, " "),  # as transformers: whitespace beside an added token
            *strip,
            prepend,
            _regex(rf"\A{SPACE}{bos}(?!\z)", self.model.bos + SPACE),
            _regex(rf"\A{SPACE}(?={names})", ""),
            _regex(rf"\A{bos}{SPACE}(?={names})", self.model.bos),
            escape,
        ]
        if self.rule == PUBLISHED_RULE:  # a part that starts with a space keeps the leading space as well
            steps += [
                _regex(rf"(?!\A){re.escape(text)}{SPACE}", text + 2 * SPACE)
                if text == self.model.bos
                else _replacement(text + SPACE, text + 2 * SPACE)
                for text in [token["content"] for token in found]
            ]
        return _sequence("normalizers", *steps)

    def _pre_tokenizer(self) -> dict[str, Any] | None:
        """Cut after the first token of a template's text that follows a special token, where the rule has that token.

        The text at the start begins with "▁", so it does not match.
        """
        splits = [
            {
                "type": "Split",
                "pattern": {"Regex": rf"\A{_escape(first)}(?={_escape(rest)})"},
                "behavior": "Isolated",
                "invert": False,
            }
            for first, rest in self.openings
        ]
        return _sequence("pretokenizers", *splits) if splits else None

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
        """Return every token up to <pad>."""
        vocabulary = {piece.text: i for i, piece in enumerate(self.model.pieces)}
        vocabulary |= {token.text: token.id for token in self.added}
        return {**vocabulary, **self.layout_ids}


def export_tokenizer(
    tokenizer: Tokenizer, template: Template, *, vocab_size: int
) -> ExportedTokenizer | ExportedHfTokenizer:
    """Convert the tokenizer of a model with `vocab_size` rows that is used with `template`.

    Raises DataError when its file is damaged; ConversionError when it has more tokens than the model has rows, already
    has <image> or <pad> as a piece, or tokenizes in a way that tokenizer.json cannot reproduce.
    """
    if isinstance(tokenizer, HfTokenizer):
        return export_hf_tokenizer(tokenizer, template, vocab_size=vocab_size)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    path, model = tokenizer.path, read_sentencepiece_model(tokenizer.path)
    problems = list(_problems(model, tokenizer, vocab_size))
    if problems:
        raise ConversionError(
            f"tokenizer {path} cannot be exported: {'; '.join(problems)}. "
            "Give the tokenizer.model that the model was trained with"
        )
    openings = tuple(_openings(tokenizer, template)) if tokenizer.rule == PUBLISHED_RULE else ()
    return ExportedTokenizer(
        model=model,
        path=path,
        layout_ids=layout_token_ids(tokenizer),
        rule=tokenizer.rule,
        added=tokenizer.added,
        openings=openings,
    )


def _openings(tokenizer: SentencePieceTokenizer, template: Template) -> Iterator[tuple[str, str]]:
    """Yield what a prompt writes after special tokens up to the user's text, as (first token, rest)."""
    frame = template.prompt
    system = frame.opening.split("{system}")[0]
    for written in (frame.answer[1] + frame.between + frame.human[0], frame.human[1] + frame.header, system):
        ids, spans = tokenizer.encode_with_offsets(written)
        after = [number + 1 for number, i in enumerate(ids) if tokenizer.is_cut_out(i)]
        opening = written[spans[after[-1] - 1][1] :] if after else ""
        if opening and opening[0] != " ":
            _, spans = tokenizer.encode_with_offsets(opening)  # with the leading space
            end = spans[0][1]
            if 0 < end < len(opening):
                yield opening[:end], opening[end:]


def slow_tokenizer_config(
    tokenizer: SentencePieceTokenizer, model: SentencePieceModel, *, max_length: int
) -> dict[str, Any]:
    """Return the content of tokenizer_config.json of a ShareGPT4V model: slow tokenizer, right padding with <unk>."""
    return {
        **_class_settings(model, rule=tokenizer.rule, max_length=max_length),
        # transformers 4.31 reads added_tokens.json in its place.
        **({"added_tokens_decoder": {str(t.id): t.to_hf() for t in tokenizer.added}} if tokenizer.added else {}),
        "pad_token": model.unk,
        "padding_side": "right",
        "use_fast": False,
    }


def slow_special_tokens_map(tokenizer: SentencePieceTokenizer, model: SentencePieceModel) -> dict[str, Any]:
    """Return the content of special_tokens_map.json of a ShareGPT4V model.

    Written as objects, as published: transformers 4.31 removes the spaces around a token that is written as a string.
    """

    def described(text: str, *, lstrip: bool = False, rstrip: bool = False) -> dict[str, Any]:
        return {"content": text, "lstrip": lstrip, "normalized": False, "rstrip": rstrip, "single_word": False}

    names = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unk}
    special = [described(t.text, lstrip=t.lstrip, rstrip=t.rstrip) for t in tokenizer.added if t.special]
    return {
        **{name: described(text) for name, text in names.items()},
        "pad_token": model.unk,
        **({"additional_special_tokens": special} if special else {}),
    }


def special_tokens_map(model: SentencePieceModel, *, pad: str) -> dict[str, str]:
    """Return the content of special_tokens_map.json."""
    return {"bos_token": model.bos, "eos_token": model.eos, "pad_token": pad, "unk_token": model.unk}


def _class_settings(model: SentencePieceModel, *, rule: TokenizerRule, max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": rule == LEGACY_RULE,
        RULE_KEY: rule,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": model.bos,
        "eos_token": model.eos,
        "unk_token": model.unk,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "sp_model_kwargs": {},
    }


def _problems(model: SentencePieceModel, tokenizer: SentencePieceTokenizer, vocab_size: int) -> Iterator[str]:
    if tokenizer.vocab_size > vocab_size:
        yield (
            f"it has {tokenizer.vocab_size} {'tokens' if tokenizer.added else 'pieces'}, the model's vocabulary is too "
            f"small: model.language.vocab_size is {vocab_size}"
        )
    if model.model_type != ModelType.BPE:
        yield f"it is of type {model.model_type.name}, LLaMA's are BPE"
    if model.treat_whitespace_as_suffix or model.precompiled_charsmap or model.remove_extra_whitespaces:
        yield "it changes the text before tokenizing (normalisation, extra or trailing whitespace), LLaMA's do not"
    if not (model.add_dummy_prefix and model.escape_whitespaces):
        yield "it adds no leading space or does not write spaces as ▁, LLaMA's do"
    texts = {piece.text for piece in model.pieces}
    for token in LAYOUT_TOKENS:
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


def _regex(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _escape(text: str) -> str:
    """Return the regular expression of a normalised text."""
    return re.escape(text.replace(" ", SPACE))


def _replacement(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}

"""Settings of a tokenizer that its `tokenizer.model` does not hold: the rule after special tokens, and added tokens.

They are read from the files that transformers writes beside the model. docs/data.md has a table of the three rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_share4v.errors import DataError
from megatron_share4v.files import read_text

TokenizerRule = Literal["legacy", "transformers-4.31", "transformers-4.34"]
"""How the text after a special token (`</s>USER:`) is tokenised; text at the start and after an image is the same.

legacy: with sentencepiece's leading space (transformers' `legacy: true`, all versions).
transformers-4.31: tokenised with the leading space, which is then removed (`legacy: false` in 4.31).
transformers-4.34: without a leading space (`legacy: false` since 4.34).
"""
RULES: tuple[TokenizerRule, ...] = get_args(TokenizerRule)
PUBLISHED_RULE: TokenizerRule = "transformers-4.31"
"""The rule that ShareGPT4V, LLaVA-1.5 and Vicuna 1.5 were trained with: `legacy: false` under transformers 4.31."""
LEGACY_RULE: TokenizerRule = "legacy"
"""The rule of data sets and checkpoints that do not state one: they were made before there were others."""

TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS = "special_tokens_map.json"
RULE_KEY = "tokenizer_rule"
"""Key of this project in tokenizer_config.json; transformers ignores it."""


@dataclass(frozen=True)
class AddedToken:
    """A token that was added after the pieces of the sentencepiece model.

    lstrip, rstrip: the whitespace before or after it belongs to it. special: decoding leaves it out.
    """

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = False

    def to_hf(self) -> dict[str, Any]:
        """Return the entry of `added_tokens_decoder` in tokenizer_config.json."""
        rules = {"single_word": False, "lstrip": self.lstrip, "rstrip": self.rstrip, "normalized": False}
        return {"content": self.text, **rules, "special": self.special}


@dataclass(frozen=True)
class TokenizerSettings:
    """Rule and added tokens of a tokenizer. origin: where the rule comes from, for messages."""

    rule: TokenizerRule = PUBLISHED_RULE
    origin: str = "the published models' rule"
    stated: bool = False
    """Whether a file or an option states the rule; else it is a default."""
    tokens: tuple[AddedToken, ...] = ()
    """Tokens named in the files, by id; those with the id of a piece repeat it."""

    def to_json(self, *, first_added: int) -> str:
        """Return the content of tokenizer_config.json for a checkpoint; `first_added`: number of pieces."""
        added = {str(token.id): token.to_hf() for token in self.tokens if token.id >= first_added}
        content = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": self.rule == LEGACY_RULE,
            RULE_KEY: self.rule,
            **({"added_tokens_decoder": added} if added else {}),
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_tokenizer_settings(
    model: Path, *, rule: TokenizerRule | None = None, default: TokenizerRule = PUBLISHED_RULE
) -> TokenizerSettings:
    """Read the settings from the files beside the sentencepiece file `model`.

    The rule is `rule` if given, else what tokenizer_config.json states (a missing `legacy` there means true, as in
    transformers), else `default`. Raises DataError for a damaged file or an unknown rule.
    """
    directory = model.parent
    config = read_json_object(directory / TOKENIZER_CONFIG)
    tokens = _added_tokens(directory, config or {})
    if rule is not None:
        return TokenizerSettings(rule=rule, origin="chosen by an option", stated=True, tokens=tokens)
    if config is None:
        absent = f"there is no {directory / TOKENIZER_CONFIG}"
        meaning = "the published models' rule" if default == PUBLISHED_RULE else "the only rule of older files"
        return TokenizerSettings(rule=default, origin=f"{absent}: {meaning}", tokens=tokens)
    stated = config.get(RULE_KEY)
    if stated is not None:
        if stated not in RULES:
            raise DataError(
                f"{directory / TOKENIZER_CONFIG}: {RULE_KEY} is {stated!r}; it is one of {', '.join(RULES)}"
            )
        return TokenizerSettings(rule=stated, origin=f"{directory / TOKENIZER_CONFIG}", stated=True, tokens=tokens)
    legacy = config.get("legacy")
    if legacy not in (True, False, None):
        raise DataError(f"{directory / TOKENIZER_CONFIG}: legacy is {legacy!r}; it is true or false")
    found = PUBLISHED_RULE if legacy is False else LEGACY_RULE
    says = "has no legacy, which means true" if legacy is None else f"says legacy: {str(legacy).lower()}"
    return TokenizerSettings(rule=found, origin=f"{directory / TOKENIZER_CONFIG} {says}", stated=True, tokens=tokens)


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Read the tokens of `added_tokens_decoder` (transformers 4.34 and later) and of added_tokens.json, by id.

    A token of added_tokens.json alone takes the whitespace around it, as transformers did when it wrote only that file,
    unless special_tokens_map.json describes it otherwise.
    """
    special_map = read_json_object(directory / SPECIAL_TOKENS) or {}
    special: dict[str, Mapping[str, Any] | None] = {}
    for value in special_map.values():
        for entry in value if isinstance(value, list) else [value]:
            special[str(entry.get("content")) if isinstance(entry, dict) else str(entry)] = (
                entry if isinstance(entry, dict) else None
            )
    found: dict[int, AddedToken] = {}
    try:
        for text, number in (read_json_object(directory / ADDED_TOKENS) or {}).items():
            rules = special.get(text) or {"lstrip": True, "rstrip": True}
            found[int(number)] = _token(text, int(number), rules, special=text in special)
        for number, entry in (config.get("added_tokens_decoder") or {}).items():
            found[int(number)] = _token(entry["content"], int(number), entry, special=bool(entry.get("special")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{directory}: the added tokens in {ADDED_TOKENS} or {TOKENIZER_CONFIG} cannot be read ({error!r}); "
            "copy the files of the model again"
        ) from error
    return tuple(found[number] for number in sorted(found))


def _token(text: str, number: int, rules: Mapping[str, Any], *, special: bool) -> AddedToken:
    return AddedToken(text, number, bool(rules.get("lstrip")), bool(rules.get("rstrip")), special)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None when there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object; copy it again")
    return content

"""Open a tokenizer file of either kind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megatron_share4v.errors import DataError
from megatron_share4v.text.hf_tokenizer import HfTokenizer
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import PUBLISHED_RULE, TokenizerRule, read_tokenizer_settings

TOKENIZER_FILES = (SentencePieceTokenizer.file_name, HfTokenizer.file_name)
"""Names of tokenizer files beside a model's weights; where there are both, the first one is used."""


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    rule: TokenizerRule | None = None,
    default: TokenizerRule = PUBLISHED_RULE,
    beside: Path | None = None,
) -> Tokenizer:
    """Open a sentencepiece `tokenizer.model` or a `tokenizer.json`, told apart by their content.

    For sentencepiece, the rule after special tokens is `rule` if given, else that of the files beside it, else
    `default`; `beside` names a file of another directory whose settings apply. Raises DataError when the file is not
    usable, or for a `rule` with a tokenizer.json.
    """
    if Path(path).is_dir():
        found = find_tokenizer(Path(path))
        remedy = (
            f"give the path of its tokenizer file, {found}" if found else f"no {' or '.join(TOKENIZER_FILES)} in it"
        )
        raise DataError(f"tokenizer {path}: is a directory; {remedy}")
    if not is_tokenizer_json(Path(path)):
        settings = read_tokenizer_settings(beside or Path(path), rule=rule, default=default)
        return SentencePieceTokenizer(path, settings=settings)
    if rule is not None:
        raise DataError(
            f"tokenizer {path}: the tokenizer rule {rule} is for a sentencepiece tokenizer.model; a tokenizer.json "
            "states itself how text after a special token is tokenised. Leave the rule out"
        )
    return HfTokenizer(path)


def with_rule(tokenizer: Tokenizer, rule: TokenizerRule, *, origin: str) -> Tokenizer:
    """Return a sentencepiece tokenizer with another rule; `origin` says where it comes from."""
    assert isinstance(tokenizer, SentencePieceTokenizer), f"{tokenizer.path} has no rule to replace"
    settings = replace(tokenizer.settings, rule=rule, origin=origin, stated=True)
    return SentencePieceTokenizer(tokenizer.path, settings=settings)


def find_tokenizer(directory: Path) -> Path | None:
    """Return the tokenizer file in `directory`; None without one."""
    return next((path for name in TOKENIZER_FILES if (path := directory / name).is_file()), None)


def is_tokenizer_json(path: Path) -> bool:
    """Whether the file holds a JSON object, as a tokenizer.json does; a file without content is judged by its name."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(64)
    if not start or start.startswith(b"version https://git-lfs"):
        return path.suffix == ".json"
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")

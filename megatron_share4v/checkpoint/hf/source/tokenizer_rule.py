"""Find the tokenizer of a Hugging Face model: its sentencepiece file, its rule after special tokens, added tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_share4v.checkpoint.assets import TOKENIZER
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import (
    ADDED_TOKENS,
    TOKENIZER_CONFIG,
    TokenizerRule,
    read_tokenizer_settings,
)


def open_source_tokenizer(directories: Sequence[Path], *, given: Path | None, rule: TokenizerRule | None) -> Tokenizer:
    """Open the tokenizer `given`, or that of the first of `directories` (the model, then its base model) with one.

    Logs rule and added tokens. Raises ConversionError when there is none; DataError when it is not usable.
    """
    candidates = [given] if given else [path / TOKENIZER for path in directories]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ConversionError(
            f"{candidates[0]}: missing; give the model's sentencepiece file with --tokenizer "
            "(a tokenizer.json is not enough)"
        )
    # A directory without a sentencepiece file (an adapter) can add tokens to those of its base model.
    own = given is None and any((directories[0] / name).is_file() for name in (TOKENIZER_CONFIG, ADDED_TOKENS))
    described = directories[0] / TOKENIZER if own else found
    tokenizer = Tokenizer(found, settings=read_tokenizer_settings(described, rule=rule))
    get_logger().info("tokenizer rule: %s (%s)", tokenizer.rule, tokenizer.settings.origin)
    if tokenizer.added:
        named = ", ".join(f"{token.text} {token.id}" for token in tokenizer.added)
        get_logger().info("tokens added after the %d pieces: %s", tokenizer.pieces, named)
    return tokenizer

"""Find the tokenizer of a Hugging Face model: its file, sentencepiece's rule after special tokens, added tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.load_tokenizer import TOKENIZER_FILES, load_tokenizer
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import ADDED_TOKENS, TOKENIZER_CONFIG, TokenizerRule


def open_source_tokenizer(directories: Sequence[Path], *, given: Path | None, rule: TokenizerRule | None) -> Tokenizer:
    """Open the tokenizer `given`, or that of the first of `directories` (the model, then its base model) with one.

    Logs rule and added tokens. Raises ConversionError when there is none; DataError when it is not usable.
    """
    candidates = [directory / name for name in TOKENIZER_FILES for directory in directories]
    found = given or next((path for path in candidates if path.is_file()), None)
    if found is None or not found.is_file():
        raise ConversionError(
            f"{found or candidates[0]}: missing; give the model's tokenizer.model or tokenizer.json with --tokenizer"
        )
    # A directory without a sentencepiece file (an adapter) can add tokens to those of its base model.
    own = given is None and any((directories[0] / name).is_file() for name in (TOKENIZER_CONFIG, ADDED_TOKENS))
    tokenizer = load_tokenizer(found, rule=rule, beside=directories[0] / found.name if own else None)
    get_logger().info("tokenizer %s: %s", found, tokenizer.summary())
    if tokenizer.added:
        named = ", ".join(f"{token.text} {token.id}" for token in tokenizer.added)
        get_logger().info("tokens added after the %d pieces: %s", tokenizer.pieces, named)
    return tokenizer

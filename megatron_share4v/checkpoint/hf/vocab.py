"""Vocabulary rows of llava-hf after the tokenizer's, for `<image>`, `<pad>` and alignment: split off by an import,
added by an export.

An export of an imported, untrained model gets the imported rows; otherwise each is the mean of the other rows: rows of
zeros could win a greedy argmax, and random rows would make exports differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_share4v.checkpoint.hf.config import HfConfig
from megatron_share4v.checkpoint.hf.naming import Naming
from megatron_share4v.checkpoint.lazy_tensor import FLOAT_NAMES, LazyTensor, cast_checked
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.text.template import IMAGE_PLACEHOLDER
from megatron_share4v.text.tokenizer import Tokenizer

ADDED_ROWS = {"embedding": "embedding.added_rows", "head": "head.added_rows"}
"""Tensor names of the imported rows in a checkpoint's unused.safetensors (checkpoint/assets.py)."""


ROW_MULTIPLE = 64
LAYOUT_TOKEN_COUNT = 2
"""<image> and <pad>."""


def padded_llava_rows(tokens: int) -> int:
    """Return the vocabulary rows of llava-hf for `tokens` tokens."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def added_vocab_rows(values: torch.Tensor, count: int, *, imported: LazyTensor | None) -> torch.Tensor:
    """Return `count` added rows for a matrix: [V, W] -> [count, W], in its dtype.

    `imported` are the rows imported with these values, possibly of another number; None for trained weights.
    """
    if imported is not None and imported.shape[0] == count:
        return cast_checked("added rows", imported, FLOAT_NAMES[values.dtype]).read()
    return values.mean(0, dtype=torch.float32).to(values.dtype).expand(count, -1)


def cut_vocabulary(
    model: ModelConfig,
    tensors: dict[str, LazyTensor],
    naming: Naming,
    *,
    config: HfConfig,
    tokenizer: Tokenizer,
    exported: int | None,
) -> tuple[ModelConfig, dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Split off the vocabulary rows that llava-hf has for `<image>`, `<pad>` and alignment after the tokenizer's.

    `<image>` and `<pad>` stay where a token was added after them, which keeps its id, and where the language model has
    more rows than the layout would add (Qwen's spare ones). exported: vocabulary size of the checkpoint that the model
    is an export of; None: unknown. Returns the model with its
    vocabulary size, the tensors, and the rows split off as `embedding` and `head`. Raises ConversionError when the
    model does not have a row for each token.
    """
    pieces = tokenizer.vocab_size
    stated = model.language.vocab_size
    names = {"embedding": f"{naming.decoder}embed_tokens.weight", "head": f"{naming.head}weight"}
    if naming.head is None:
        del names["head"]
    for name in names.values():
        rows = tensors[name].shape[0]
        if rows < pieces:
            raise ConversionError(
                f"vocabulary too small: {name} has {rows} rows, the tokenizer {tokenizer.pieces} pieces"
                + "".join(f" and the added token {token.text!r} with id {token.id}" for token in tokenizer.added[-1:])
                + "; give the tokenizer of this model"
            )
        if rows != stated:
            raise ConversionError(f"wrong shape: {name} has {rows} rows, config.json states vocab_size {stated}")
    if config.image_token is None:
        return model, tensors, {}
    image = next((token.id for token in tokenizer.added if token.text == IMAGE_PLACEHOLDER), None)
    if image is not None and image != config.image_token:
        raise ConversionError(
            f"image_token_index {config.image_token} in config.json, but {IMAGE_PLACEHOLDER} is {image} in the "
            "tokenizer's files; give the tokenizer of this model with --tokenizer"
        )
    if image is None and not pieces <= config.image_token < stated:
        raise ConversionError(
            f"image_token_index {config.image_token} in config.json lies outside {pieces} .. {stated - 1}: "
            f"the tokenizer has {pieces} tokens, the model {stated} rows, and <image> comes after the tokens; "
            "give the tokenizer of this model with --tokenizer, or correct the configuration"
        )
    vocabulary = config.image_token if image is None else pieces
    if exported is not None and vocabulary <= exported <= stated:
        vocabulary = exported
    elif stated > padded_llava_rows(vocabulary + LAYOUT_TOKEN_COUNT):
        vocabulary = stated  # the language model had spare rows, in which the layout's tokens are
    if vocabulary == stated:
        return model, tensors, {}
    added = {part: tensors[name].slice_rows(vocabulary, stated) for part, name in names.items()}
    cut = {name: tensors[name].slice_rows(0, vocabulary) for name in names.values()}
    return replace(model, language=replace(model.language, vocab_size=vocabulary)), {**tensors, **cut}, added

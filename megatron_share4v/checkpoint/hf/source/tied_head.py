"""The head of a model with tied embeddings: absent from its files, or equal to the embedding."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_share4v.checkpoint.hf.weight_map import Naming
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor
from megatron_share4v.config.model import LanguageConfig
from megatron_share4v.errors import ConversionError

ROWS = 4096
"""Rows compared at once, which bounds the memory."""


def resolve_head(
    tensors: dict[str, LazyTensor], naming: Naming, language: LanguageConfig, *, where: str
) -> tuple[dict[str, LazyTensor], Naming]:
    """Return tensors and naming without the head when it is tied.

    Raises ConversionError when the file has another head than the embedding, although `where` states that it is tied.
    """
    embedding, head = f"{naming.decoder}embed_tokens.weight", f"{naming.head}weight"
    if not language.tie_word_embeddings or naming.head is None or embedding not in tensors:
        return tensors, naming
    if not _equal(tensors[embedding], tensors[head]):
        raise ConversionError(
            f"{where} states tie_word_embeddings true, but {head} differs from {embedding}; state false if the model "
            "was trained with a head of its own, or leave the head out"
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}, replace(naming, head=None)


def _equal(first: LazyTensor, second: LazyTensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    rows = first.shape[0]
    return all(
        torch.equal(first.slice_rows(start, end).read(), second.slice_rows(start, end).read())
        for start in range(0, rows, ROWS)
        for end in [min(start + ROWS, rows)]
    )

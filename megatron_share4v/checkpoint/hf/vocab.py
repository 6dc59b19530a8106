"""Vocabulary rows of llava-hf after the tokenizer's, for `<image>`, `<pad>` and alignment.

An export of an imported, untrained model gets the imported rows; otherwise each is the mean of the other rows: rows of
zeros could win a greedy argmax, and random rows would make exports differ.
"""

from __future__ import annotations

import torch

from megatron_share4v.checkpoint.lazy_tensor import FLOAT_NAMES, LazyTensor, cast_checked

ADDED_ROWS = {"embedding": "embedding.added_rows", "head": "head.added_rows"}
"""Tensor names of the imported rows in a checkpoint's unused.safetensors (checkpoint/assets.py)."""


def added_vocab_rows(values: torch.Tensor, count: int, *, imported: LazyTensor | None) -> torch.Tensor:
    """Return `count` added rows for a matrix: [V, W] -> [count, W], in its dtype.

    `imported` are the rows imported with these values, possibly of another number; None for trained weights.
    """
    if imported is not None and imported.shape[0] == count:
        return cast_checked("added rows", imported, FLOAT_NAMES[values.dtype]).read()
    return values.mean(0, dtype=torch.float32).to(values.dtype).expand(count, -1)

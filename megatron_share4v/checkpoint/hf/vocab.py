"""The rows that llava-hf's vocabulary has after the tokenizer's, for `<image>`, `<pad>` and alignment: which ones an export gets.

A model that was imported and not trained gets its own ones back; otherwise they are the mean of the others, as rows of zeros could win a greedy
answer and random ones would make exports differ.
"""

from __future__ import annotations

import torch

from megatron_share4v.checkpoint.lazy_tensor import FLOAT_NAMES, LazyTensor, cast_checked

ADDED_ROWS = {"embedding": "embedding.added_rows", "head": "head.added_rows"}
"""Under which names a checkpoint carries them (checkpoint/assets.py)."""


def added_vocab_rows(values: torch.Tensor, count: int, *, carried: LazyTensor | None) -> torch.Tensor:
    """[V, W] -> [count, W], in its dtype. `carried`: the ones that came with these values, of which there may be another number; None: trained."""
    if carried is not None and carried.shape[0] == count:
        return cast_checked("added rows", carried, FLOAT_NAMES[values.dtype]).read()
    return values.mean(0, dtype=torch.float32).to(values.dtype).expand(count, -1)

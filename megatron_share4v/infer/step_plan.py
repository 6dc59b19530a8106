"""Plan of one engine step, made by the scheduler on TP rank 0 and executed by the model runner on every TP rank.

T new positions of several sequences, concatenated; R rows of logits; H hidden size; P slots per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_share4v.mcore.kv_cache import SequenceSpan


@dataclass(frozen=True)
class CacheCopy:
    """KV cache rows to copy from another sequence with the same prefix."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class ImageSpan:
    """Slots [n] of one image among the T positions, and the rows [n] of its P features that go there."""

    digest: bytes
    slots: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class StepPlan:
    """Work of one step, in execution order.

    evict: digests of image features to drop. encode: (digest, pixels [H, W, 3]) of images to encode.
    logits_positions: [R] of the T positions whose logits are needed.
    """

    copies: tuple[CacheCopy, ...]
    evict: tuple[bytes, ...]
    encode: tuple[tuple[bytes, torch.Tensor], ...]
    token_ids: torch.Tensor
    spans: tuple[SequenceSpan, ...]
    image_spans: tuple[ImageSpan, ...]
    logits_positions: torch.Tensor

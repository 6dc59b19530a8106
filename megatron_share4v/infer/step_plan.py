"""What one step computes: made by the scheduler on the first rank of a tensor group, carried out by the runner on all of them.

T new positions of several sequences one after the other, R rows of logits, H width, P slots per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_share4v.mcore.kv_cache import SequenceSpan


@dataclass(frozen=True)
class CacheCopy:
    """Rows of the key-value cache that begin a sequence as they began another one."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class ImageSpan:
    """Slots of one image among the T positions: slots [n], and which rows [n] of its P features go there."""

    digest: bytes
    slots: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class StepPlan:
    """In the order of execution. forget: digests of images whose features go; encode: (digest, pixels [H, W, 3]) of those that come;
    wanted: [R] positions among the T after which logits are asked for."""

    copies: tuple[CacheCopy, ...]
    evict: tuple[bytes, ...]
    encode: tuple[tuple[bytes, torch.Tensor], ...]
    token_ids: torch.Tensor
    spans: tuple[SequenceSpan, ...]
    image_spans: tuple[ImageSpan, ...]
    logits_positions: torch.Tensor

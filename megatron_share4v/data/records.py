"""Records of the data path: Sample (as stored), Example (one sample encoded), Batch (one micro-batch).

Shapes: B sequences of a micro-batch, S positions (image slots included), N images, P slots per image, T positions that
carry a label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Turn:
    """One message; `role` is "human" or "gpt" as in the LLaVA files."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One record of a shard.

    image: the encoded file (JPEG, PNG, WebP); None for text only, or when the bytes were not requested.
    has_image: true in the second case as well: the last pipeline stage needs the labels of an image's record, not the
    image.
    """

    key: str
    turns: tuple[Turn, ...]
    image: bytes | None
    has_image: bool
    shard: str = ""

    @property
    def name(self) -> str:
        """`shard:key`, for messages."""
        return f"{self.shard}:{self.key}"


@dataclass(frozen=True)
class Example:
    """One tokenised sample, image sentinels not yet expanded.

    name: `shard:key`, for messages.
    input_ids: [L] int64 with IMAGE_TOKEN_INDEX at each image.
    labels: [L] int64, same positions, IGNORE_INDEX where nothing is trained.
    pixels: [n, H, W, 3] uint8 of n images (0 or 1 in ShareGPT4V's records); None where images are not read.
    """

    key: str
    name: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """One micro-batch with the image slots in place; fields that a rank does not need are None.

    token_ids: [B, S] int64; image slots and padding hold 0.
    image_slots: [N * P] int64, flat positions b * S + s that receive the image features, in the order of `pixels`.
    pixels: [N, H, W, 3] uint8; first stage only. N may be 0.
    target_rows: [T] int64, flat positions b * S + s whose next token is trained; last stage only.
    targets: [T] int64, that next token; last stage only.
    segments: for each of the B sequences the lengths of its samples, in order; the rest of S is padding. None: one
        sample per sequence. Known on every stage from the sampler, without communication. No sample attends to another.
    feature_rows: [K] int64, with context parallelism (data/loading/context_parallel.py): which of the N * P features
        the K slots on this rank receive. None: all, in order.
    trained: trained tokens of the whole micro-batch, when context parallelism left only a part of them in `targets`.
        None: `targets` holds all.
    """

    token_ids: torch.Tensor | None
    image_slots: torch.Tensor | None
    pixels: torch.Tensor | None
    target_rows: torch.Tensor | None
    targets: torch.Tensor | None
    segments: tuple[tuple[int, ...], ...] | None = None
    feature_rows: torch.Tensor | None = None
    trained: int | None = None

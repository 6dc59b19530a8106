"""The records that flow through the data path: Sample (as stored), Example (one sample encoded), Batch (one micro-batch).

Shapes: B samples of a micro-batch, S positions (image slots included), N images, P slots per image, T positions that carry a label.
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
    """One record of a shard. `image` holds the encoded file (JPEG, PNG, WebP); None for text only, or where its bytes were not asked for.

    `has_image` is true in the second case: the last pipeline stage needs the labels of an image's record but not the image.
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
    """One sample, tokenised, image sentinels not yet expanded.

    input_ids: [L] int64 with IMAGE_TOKEN_INDEX at each image; labels: [L] int64, same positions, IGNORE_INDEX where nothing is trained;
    pixels: [n, H, W, 3] uint8 for n images (n is 0 or 1 in ShareGPT4V's records); None where images are not read.
    name: `shard:key`, for messages.
    """

    key: str
    name: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """One micro-batch, everything with the image slots already in place. A rank that does not need a field has None there.

    token_ids: [B, S] int64; image slots and padding hold 0.
    image_slots: [N * P] int64, flat positions b * S + s that receive the image features, in the order of `pixels`.
    pixels: [N, H, W, 3] uint8; first stage only. N may be 0.
    target_rows: [T] int64, flat positions b * S + s whose next token is trained; last stage only.
    targets: [T] int64, that next token; last stage only.
    feature_rows: [K] int64, where context parallelism left K slots of those of N images (data/loading/context_parallel.py): which of the N * P features they
    receive. None: all, in their order.
    trained: what the micro-batch trains in all, where context parallelism left a part of it in `targets`. None: `targets` is all.
    segments: for each of the B sequences the positions that each of its samples takes, in order; what is left of S is padding. None: each
    sequence is one sample. Plain integers, known on every stage from the plan (data/sampling/sampler.py): no sample sees another.
    """

    token_ids: torch.Tensor | None
    image_slots: torch.Tensor | None
    pixels: torch.Tensor | None
    target_rows: torch.Tensor | None
    targets: torch.Tensor | None
    segments: tuple[tuple[int, ...], ...] | None = None
    feature_rows: torch.Tensor | None = None
    trained: int | None = None

"""Pixels of decoded images: the decoders' result, and normalisation by CLIP's mean and deviation.

N images, S the vision tower's input side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_share4v.data.images.policy import PAD_COLOUR, ImagePolicy

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class DecodedBatch:
    """Decoded images.

    pixels: [N, S, S, 3] uint8, the mean colour where decoding failed; failures: position -> reason;
    by_reference: positions that the backend left to Pillow (unsupported formats).
    """

    pixels: torch.Tensor
    failures: dict[int, str]
    by_reference: tuple[int, ...] = ()


def mean_colour_images(count: int, policy: ImagePolicy) -> torch.Tensor:
    """[count, S, S, 3] uint8 in the mean colour, in place of missing images."""
    return (
        torch.tensor(PAD_COLOUR, dtype=torch.uint8).expand(count, policy.image_size, policy.image_size, 3).contiguous()
    )


def normalise(pixels: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] of `dtype`, on the same device: (value / 255 - mean) / deviation.

    In fp32 bit-equal to Hugging Face's CLIPImageProcessorPil: the 256 values of a channel are computed once, by its
    formula.
    """
    table = normalised_values(pixels.device, dtype).flatten()
    channels = torch.arange(3, device=pixels.device).mul_(256).view(1, 3, 1, 1)
    return table[pixels.permute(0, 3, 1, 2).long() + channels]


@lru_cache(maxsize=8)
def normalised_values(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[3, 256]: normalised form of each value of each channel. Shared by all callers: read-only."""
    scaled = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
    mean, std = (torch.tensor(numbers, dtype=torch.float32).unsqueeze(1) for numbers in (CLIP_MEAN, CLIP_STD))
    return ((scaled - mean) / std).to(device=device, dtype=dtype)

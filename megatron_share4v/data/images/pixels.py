"""Pixels of decoded images: the decoders' result, and normalisation by the tower's mean and standard deviation.

N images, S the vision tower's input side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.policy import ImagePolicy, Statistics


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
    colour = torch.tensor(policy.pad_colour, dtype=torch.uint8)
    return colour.expand(count, policy.image_size, policy.image_size, 3).contiguous()


def normalise(pixels: torch.Tensor, *, dtype: torch.dtype, vision: VisionConfig) -> torch.Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] of `dtype`, on the same device: (value / 255 - mean) / deviation.

    In fp32 bit-equal to Hugging Face's image processors: the 256 values of a channel are computed once, by their
    formula. `vision` gives mean and deviation.
    """
    table = normalised_values(vision, device=pixels.device, dtype=dtype).flatten()
    channels = torch.arange(3, device=pixels.device).mul_(256).view(1, 3, 1, 1)
    return table[pixels.permute(0, 3, 1, 2).long() + channels]


def normalised_values(vision: VisionConfig, *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[3, 256]: normalised form of each value of each channel. Shared by all callers: read-only."""
    return _normalised_values(vision.image_mean, vision.image_std, device, dtype)


@lru_cache(maxsize=8)
def _normalised_values(
    image_mean: Statistics, image_std: Statistics, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    scaled = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
    mean, std = (torch.tensor(numbers, dtype=torch.float32).unsqueeze(1) for numbers in (image_mean, image_std))
    return ((scaled - mean) / std).to(device=device, dtype=dtype)

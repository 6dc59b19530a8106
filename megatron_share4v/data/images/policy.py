"""Image policy: CLIP's mean and deviation, sizes, padding, limits; the decoders' result; and normalisation.

decoder.py decodes and resizes. N images, S the vision tower's input side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from megatron_share4v.errors import DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)  # int(mean * 255), LLaVA's expand2square
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200


class OversizedImage(DataError):
    """Image whose size, or whose decoding work (decode_limits.py), is beyond the limits."""


@dataclass(frozen=True)
class ImagePolicy:
    """Preprocessing of images to S x S (`image_size`) pixels.

    `square` resizes the short side to S and crops the centre; `pad` first pads to a square with PAD_COLOUR.
    orientation: `stored` takes the pixels as they are in the file, `exif` turns them upright by the EXIF tag.
    """

    image_size: int
    aspect_ratio: Literal["square", "pad"] = "pad"
    orientation: Literal["stored", "exif"] = "stored"

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before resizing: the padded square, or the image itself."""
        side = max(width, height)
        return (side, side) if self.aspect_ratio == "pad" else (width, height)

    def is_canvas_huge(self, width: int, height: int) -> bool:
        """Whether an image's canvas has more pixels than an image may have; then only `pil` decodes it."""
        return math.prod(self.canvas(width, height)) > MAX_PIXELS

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing, before the crop: short side S, long side truncated to an integer."""
        short, long = sorted((width, height))
        size = self.image_size, int(self.image_size * long / short)
        return size if width <= height else size[::-1]

    def crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the centre S x S."""
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        return left, top, left + self.image_size, top + self.image_size


def check_image_size(width: int, height: int) -> None:
    """Reject implausible sizes before decoding. Raises OversizedImage."""
    if not width or not height or width * height > MAX_PIXELS:
        raise OversizedImage(
            f"image is {width} x {height} pixels; accepted are 1 to {MAX_PIXELS}. Scale it down or leave it out"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise OversizedImage(
            f"image is {width} x {height} pixels; one side is more than {MAX_ASPECT} times the other. Cut it or leave "
            f"it out"
        )


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

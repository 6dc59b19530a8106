"""Image policy: sizes, padding, and the limits of accepted images.

decoder.py decodes and resizes. Free of torch, so that processes which only decode start quickly. S: the vision tower's
input side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_share4v.errors import DataError

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


def check_image_size(width: int, height: int, *, max_pixels: int = MAX_PIXELS) -> None:
    """Reject implausible sizes before decoding. Raises OversizedImage."""
    if not width or not height or width * height > max_pixels:
        raise OversizedImage(
            f"image is {width} x {height} pixels; accepted are 1 to {max_pixels}. Scale it down or leave it out"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise OversizedImage(
            f"image is {width} x {height} pixels; one side is more than {MAX_ASPECT} times the other. Cut it or leave "
            f"it out"
        )

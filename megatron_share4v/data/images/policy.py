"""Image policy: sizes, filter, padding, and the limits of accepted images.

decoder.py decodes and resizes. Free of torch and of the configuration's classes, so that processes which only decode
start quickly. S: the vision tower's input side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_share4v.errors import DataError

if TYPE_CHECKING:
    from megatron_share4v.config.data import DataConfig
    from megatron_share4v.config.model import VisionConfig

Filter = Literal["bicubic", "bilinear", "lanczos"]
Colour = tuple[int, int, int]
Statistics = tuple[float, float, float]
"""A value for each RGB channel."""

CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200


class OversizedImage(DataError):
    """Image whose size, or whose decoding work (decode_limits.py), is beyond the limits."""


@dataclass(frozen=True)
class ImagePolicy:
    """Preprocessing of images to S x S (`image_size`) pixels, and their normalisation. Defaults: CLIP's.

    aspect_ratio: `pad` first pads to a square with the mean colour; `square` does not.
    orientation: `stored` takes the pixels as they are in the file, `exif` turns them upright by the EXIF tag.
    The other fields are VisionConfig's: `resize` shortest_edge resizes the short side to `resize_edge` (None: S) and
    crops the centre, square resizes both sides to S.
    """

    image_size: int
    aspect_ratio: Literal["square", "pad"] = "pad"
    orientation: Literal["stored", "exif"] = "stored"
    resample: Filter = "bicubic"
    resize: Literal["shortest_edge", "square"] = "shortest_edge"
    resize_edge: int | None = None
    image_mean: Statistics = CLIP_MEAN
    image_std: Statistics = CLIP_STD

    @classmethod
    def from_config(cls, vision: VisionConfig, data: DataConfig) -> ImagePolicy:
        """Make the policy of a tower and a run's data section."""
        return cls(
            image_size=vision.image_size,
            aspect_ratio=data.image_aspect_ratio,
            orientation=data.image_orientation,
            resample=vision.resample,
            resize=vision.resize,
            resize_edge=vision.resize_edge,
            image_mean=vision.image_mean,
            image_std=vision.image_std,
        )

    def __str__(self) -> str:
        """Describe the preprocessing in one phrase, for the log."""
        padded = [f"padded to a square with {self.pad_colour}"] if self.aspect_ratio == "pad" else []
        whole = f"{self.image_size} x {self.image_size}"
        if self.resize == "square":
            return ", ".join([*padded, f"resized to {whole} ({self.resample})"])
        edge = self.resize_edge or self.image_size
        return ", ".join([*padded, f"short side resized to {edge} ({self.resample})", f"centre {whole} cropped"])

    @property
    def pad_colour(self) -> Colour:
        """Colour of the padding: the mean, truncated to integers as LLaVA's expand2square does."""
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        return red, green, blue

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before resizing: the padded square, or the image itself."""
        side = max(width, height)
        return (side, side) if self.aspect_ratio == "pad" else (width, height)

    def is_canvas_huge(self, width: int, height: int) -> bool:
        """Whether an image's canvas has more pixels than an image may have; then only `pil` decodes it."""
        return math.prod(self.canvas(width, height)) > MAX_PIXELS

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a canvas after resizing, before the crop; a long side is truncated to an integer."""
        if self.resize == "square":
            return self.image_size, self.image_size
        short, long = sorted((width, height))
        edge = self.resize_edge or self.image_size
        size = edge, int(edge * long / short)
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

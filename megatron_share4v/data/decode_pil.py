"""Encoded image files to uint8 pixels with Pillow: the reference that other decoders are measured against.

The same pixels as LLaVA's: EXIF orientation ignored, expand2square, then the resize and crop of CLIPImageProcessorPil.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_share4v.data.image import PAD_COLOUR, ImagePolicy, check_size
from megatron_share4v.errors import DataError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "JPEG2000": "jp2", "AVIF": "avif"}

# What Pillow's decoders raise for damaged files.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class ImageHeader:
    """Width and height in pixels, and the extension that the format goes by in a shard."""

    width: int
    height: int
    extension: str


def inspect(data: bytes) -> ImageHeader:
    """Decode the whole image once, keeping only its header. Raises DataError when it cannot be decoded or is not accepted."""
    image = _open(data)
    _to_rgb(image)
    return ImageHeader(width=image.width, height=image.height, extension=EXTENSIONS[image.format])


def decode(data: bytes, policy: ImagePolicy) -> np.ndarray:
    """One encoded image -> [S, S, 3] uint8 under `policy`. Raises DataError when it cannot be decoded."""
    image = _to_rgb(_open(data))
    if policy.aspect_ratio == "pad":
        image = _pad_to_square(image)
    image = image.resize(policy.resized(*image.size), resample=Image.Resampling.BICUBIC)
    return np.asarray(image.crop(policy.crop_box(*image.size)))


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except _UNREADABLE as error:
        raise DataError(f"image cannot be read ({len(data)} bytes, {_text(error)}); replace the file or leave the record out") from error
    # Before anything is decoded: Pillow would run an interpreter for some formats (EPS).
    if image.format not in EXTENSIONS:
        raise DataError(f"image is in {image.format} format; accepted are {', '.join(EXTENSIONS)}. Convert it or leave the record out")
    check_size(*image.size)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise DataError(f"image has {image.mode}-mode pixels (32 bits per channel); convert it to 8 or 16 bits or leave the record out")
    try:
        image.load()
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit gray to white; this is the exact scale, rounded.
            image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        return image.convert("RGB")
    except _UNREADABLE as error:
        raise DataError(f"image cannot be decoded ({image.format}, {_text(error)}); replace the file or leave the record out") from error


def _pad_to_square(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square: the image in the middle, an odd pixel of padding at the right or bottom."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

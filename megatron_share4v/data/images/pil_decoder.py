"""Pillow decoder, the reference for all other decoders: encoded image files to uint8 pixels.

The same pixels as LLaVA's: EXIF orientation ignored (unless the policy asks for it), expand2square, then the resize and
crop of Hugging Face's image processors.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image

from megatron_share4v.data.images.decode_limits import TimedFile, check_jpeg_scans, count_jpeg_scans
from megatron_share4v.data.images.file_kind import describe_file
from megatron_share4v.data.images.png_metadata import drop_long_metadata
from megatron_share4v.data.images.policy import (
    MAX_PIXELS,
    Colour,
    ImagePolicy,
    OversizedImage,
    check_image_size,
)
from megatron_share4v.data.images.tall_padding import resize_padded_width
from megatron_share4v.errors import DataError

VERSION = f"pillow {PIL.__version__}"
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "JPEG2000": "jp2",
    "AVIF": "avif",
}
_SUBTYPES = {"jpg": "jpeg", "tif": "tiff"}
"""Media subtypes that differ from the file extension."""

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filters by ImagePolicy.resample."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of an EXIF orientation upright; 1 is upright."""

# What Pillow's decoders raise for damaged files.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class ImageHeader:
    """Width and height in pixels, and the file extension of the format in a shard."""

    width: int
    height: int
    extension: str


def validate_image(data: bytes) -> ImageHeader:
    """Decode the whole image once and return its header. Raises DataError when it is undecodable or not accepted."""
    image = open_header(data)
    _to_rgb(image)
    assert image.format is not None, "open_header accepts known formats only"
    return ImageHeader(width=image.width, height=image.height, extension=EXTENSIONS[image.format])


def decode(data: bytes, policy: ImagePolicy) -> np.ndarray:
    """Decode one image to [S, S, 3] uint8 under `policy`. Raises DataError when it cannot be decoded."""
    image = open_rgb(data, policy=policy)
    width, height = policy.canvas(*image.size)
    size, resample = policy.resized(width, height), FILTERS[policy.resample]
    if image.size != (width, height):
        if image.width > image.height:
            # Pillow resizes the width first and rounds in between. Constant rows of padding can be added after that.
            image, width = image.resize((size[0], image.height), resample=resample), size[0]
        elif policy.is_canvas_huge(*image.size):
            image, width = (
                resize_padded_width(
                    image, side=height, size=size[0], resample=policy.resample, colour=policy.pad_colour
                ),
                size[0],
            )
        image = pad_to_canvas(image, width=width, height=height, colour=policy.pad_colour)
    image = image.resize(size, resample=resample)
    return np.asarray(image.crop(policy.crop_box(*image.size)))


def open_rgb(data: bytes, *, policy: ImagePolicy | None = None) -> Image.Image:
    """Decode an image to 8-bit RGB, turned upright if `policy` asks for it. Raises DataError."""
    return _to_rgb(open_header(data), upright=policy is not None and policy.orientation == "exif")


def read_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) without a readable tag."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _UNREADABLE:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def image_to_data_url(data: bytes) -> str:
    """Encode an image as data:image/TYPE;base64,... Raises DataError when it cannot be decoded."""
    extension = validate_image(data).extension
    return f"data:image/{_SUBTYPES.get(extension, extension)};base64,{base64.b64encode(data).decode()}"


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode [H, W, 3] uint8 pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def crop_centre_square(data: bytes) -> bytes:
    """Crop the centre square, as CLIP's policy `square` does, in full resolution; PNG. Raises DataError."""
    image = open_rgb(data)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    kept = io.BytesIO()
    image.crop((left, top, left + side, top + side)).save(kept, format="PNG")
    return kept.getvalue()


def pad_to_canvas(image: Image.Image, *, width: int, height: int, colour: Colour) -> Image.Image:
    """LLaVA's expand2square to any size: image centred, an odd pixel of padding at the right or bottom."""
    if image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def open_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read format, mode and size and check them, without decoding. Raises DataError."""
    scans = count_jpeg_scans(data)
    try:
        image = Image.open(TimedFile(drop_long_metadata(data)))
    except Image.DecompressionBombError as error:
        raise OversizedImage(
            f"image has more pixels than are accepted, {max_pixels}. Scale it down or leave it out"
        ) from error
    except _UNREADABLE as error:
        kind = describe_file(data) if isinstance(error, PIL.UnidentifiedImageError) else None
        raise DataError(
            f"image cannot be read ({len(data)} bytes, {kind or _text(error)}); replace the file or leave it out"
        ) from error
    # Before anything is decoded: Pillow would run an interpreter for some formats (EPS).
    if image.format not in EXTENSIONS:
        raise DataError(
            f"image is in {image.format} format; accepted are {', '.join(EXTENSIONS)}. Convert it or leave it out"
        )
    check_image_size(*image.size, max_pixels=max_pixels)
    check_jpeg_scans(scans, width=image.width, height=image.height)
    return image


def _to_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    if image.mode in ("I", "F"):
        raise DataError(
            f"image has {image.mode}-mode pixels (32 bits per channel); convert it to 8 or 16 bits or leave it out"
        )
    try:
        image.load()
        # Pillow itself turns a TIFF upright when it loads it, and then removes the tag.
        if upright and (turn := _UPRIGHT.get(read_orientation(image))) is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit gray to white; this is the exact scale, rounded.
            image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")
    except _UNREADABLE as error:
        raise DataError(
            f"image cannot be decoded ({image.format}, {_text(error)}); replace the file or leave it out"
        ) from error


def _text(error: BaseException) -> str:
    # Pillow puts the address of an object into this message; the reason must be equal on all ranks and in all runs.
    return (
        "in no format that Pillow knows"
        if isinstance(error, PIL.UnidentifiedImageError)
        else f"{type(error).__name__}: {error}"
    )

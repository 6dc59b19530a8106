"""From an image URL in a request to bytes that are safe to decode.

Accepted: PNG, JPEG, WebP, GIF (first frame) and BMP. The pixel size is read from the header before decoding. EXIF
orientation is ignored, as in training. Decoding is data/images/pil_decoder.py's, which rejects truncated files.
"""

from __future__ import annotations

import base64
import binascii
import re

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.data.images.pil_decoder import open_header
from megatron_share4v.serve.api_error import ApiError

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")
_DATA_URI = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]{0,100})*;base64,", re.ASCII | re.IGNORECASE
)


def is_inline(url: str) -> bool:
    """Whether the URL is a data URL."""
    return url[:5].lower() == "data:"


def decode_data_uri(url: str, *, place: str, max_bytes: int) -> bytes:
    """Decode `data:image/...;base64,...`. place: the image's name in error messages. Raises ApiError."""
    head = _DATA_URI.match(url[:512])
    if not head or not (head["type"] or "image/").lower().startswith("image/"):
        raise ApiError(f"{place}: the data URL must begin with data:image/TYPE;base64,", param=place)
    size = (len(url) - head.end()) * 3 // 4
    if size > max_bytes + 2:
        raise too_large(size, place=place, max_bytes=max_bytes)
    try:
        data = base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ApiError(
            f"{place}: the data URL's base64 is damaged; use the plain alphabet with padding and no line breaks",
            param=place,
        ) from error
    return data


def check_image(data: bytes, config: ServeConfig, *, place: str) -> None:
    """Check size and format. Raises ApiError, and DataError for an unreadable header."""
    if len(data) > config.max_image_bytes:
        raise too_large(len(data), place=place, max_bytes=config.max_image_bytes)
    if not data.startswith(_SIGNATURES) and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        raise ApiError(f"{place}: not an image in PNG, JPEG, WebP, GIF or BMP format ({len(data)} bytes)", param=place)
    width, height = open_header(data).size
    if width * height > config.max_image_pixels:
        raise ApiError(
            f"{place}: {width} x {height} pixels; accepted are {config.max_image_pixels}. Scale it down", param=place
        )


def too_large(size: int, *, place: str, max_bytes: int) -> ApiError:
    """Error for a file with too many bytes."""
    return ApiError(f"{place}: the image has {size} bytes; accepted are {max_bytes}", param=place)

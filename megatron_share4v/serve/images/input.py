"""From an image URL in a request to bytes that are safe to decode.

Accepted: PNG, JPEG, WebP, GIF (first frame) and BMP. Nothing here parses an image: that is done in the processes of
data/images/decode_pool.py. EXIF orientation is ignored, as in training, and truncated files are rejected.
"""

from __future__ import annotations

import base64
import binascii
import re

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.json_fields import format_value

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")
_DATA_URI = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]{0,100})*(?P<base64>;base64)?,", re.ASCII | re.IGNORECASE
)


def is_inline(url: str) -> bool:
    """Whether the URL is a data URL."""
    return url[:5].lower() == "data:"


def decode_data_uri(url: str, *, place: str, max_bytes: int) -> bytes:
    """Decode `data:image/...;base64,...`. place: the image's name in error messages. Raises ApiError."""
    head = _DATA_URI.match(url[:512])
    mistake = _head_mistake(head)
    if head is None or mistake:
        raise ApiError(f"{place}: the data URL {mistake}", param=place)
    content = url[head.end() :]
    size = len(content) * 3 // 4
    if size > max_bytes + 2:
        raise too_large(size, place=place, max_bytes=max_bytes)
    if not content:
        raise ApiError(f"{place}: the data URL has nothing after its comma", param=place)
    try:
        return base64.b64decode(content.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ApiError(f"{place}: the data URL's base64 {_base64_mistake(content)}", param=place) from error


def _head_mistake(head: re.Match[str] | None) -> str:
    """What is wrong with the part before the comma; empty when nothing is."""
    if head is None:
        return "must begin with data:image/TYPE;base64,"
    kind = (head["type"] or "image/").lower()
    if not kind.startswith("image/"):
        return f"has the type {kind[:60]}; write image/png, image/jpeg or what the file is"
    return "" if head["base64"] else "has no ;base64 before its comma, which it needs"


def _base64_mistake(content: str) -> str:
    sample = content[:10_000]
    if sample.startswith(("b'", 'b"')):
        return "is the repr of Python's bytes (b'...'); decode it to a string"
    if re.search(r"\s", sample):
        return "has spaces or line breaks; encode it as one line"
    if re.search(r"%(2B|2F|3D)", content, re.IGNORECASE):
        return "is percent-encoded; write it as it is"
    strange = re.search(r"[^A-Za-z0-9+/=]", content)
    if strange is None and re.search(r"=[^=]|={3}", content):
        return "has padding (=) in its middle; encode the whole file at once"
    if strange is None:
        return f"is cut off or lacks its padding: it has {len(content)} characters, which must be a multiple of 4"
    if strange[0] in "-_":
        return "is in the URL-safe alphabet; use the plain one, with + and /"
    return f"has {format_value(strange[0])} at character {strange.start()}, which is not in its alphabet"


def check_image(data: bytes, config: ServeConfig, *, place: str) -> None:
    """Check the size of a file and the signature of its format. Raises ApiError."""
    if len(data) > config.max_image_bytes:
        raise too_large(len(data), place=place, max_bytes=config.max_image_bytes)
    if not data.startswith(_SIGNATURES) and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        raise ApiError(f"{place}: not an image in PNG, JPEG, WebP, GIF or BMP format ({len(data)} bytes)", param=place)


def too_large(size: int, *, place: str, max_bytes: int) -> ApiError:
    """Error for a file with too many bytes."""
    return ApiError(f"{place}: the image has {size} bytes; accepted are {max_bytes}", param=place)

"""What is wrong with the URL of an image, said before anything is fetched or decoded."""

from __future__ import annotations

import re

from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.images.input import is_inline
from megatron_share4v.serve.json_fields import format_value

_BASE64_STARTS = {"iVBORw0KGgo": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp", "Qk": "bmp"}
"""How a file of the type begins in base64."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]{24,}\Z")
_PATH = re.compile(r"file:|[/\\~.]|[A-Za-z]:[\\/]|[\w .()-]+\.\w{2,5}\Z", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
AS_DATA = "send the bytes of the file as data:image/png;base64,..."


def check_image_url(url: str, *, place: str) -> None:
    """Refuse what is neither a data URL nor an http(s) URL, and say what it looks like. Raises ApiError."""
    if is_inline(url) or url[:7].lower() == "http://" or url[:8].lower() == "https://":
        return
    raise ApiError(f"{place}: {_describe(url)}", param=place)


def _describe(url: str) -> str:
    start = url[:200].strip()
    if not start:
        return f"the image's URL is empty; {AS_DATA}"
    quoted = start.lstrip("\"'").removeprefix("b'")
    if quoted != start and (is_inline(quoted) or _base64_type(quoted)):
        return f"the image's URL begins with {start[:2]!r}: it was quoted twice, or is the repr of Python's bytes"
    kind = _base64_type(start)
    if kind or (len(url) > 200 and _BASE64.match(start)):
        return f"the image is bare base64; write data:image/{kind or 'png'};base64, before it"
    if _PATH.match(start):
        return f"{format_value(start)} looks like a path; the server reads no files: {AS_DATA}"
    scheme = _SCHEME.match(start)
    what = f"{scheme[1].lower()[:20]}: URLs are not supported" if scheme else f"{format_value(start)} is not a URL"
    return f"{what}; {AS_DATA}, or an http(s) URL where the server fetches them"


def _base64_type(text: str) -> str | None:
    return next(
        (kind for start, kind in _BASE64_STARTS.items() if text.startswith(start) and _BASE64.match(text[:200])), None
    )

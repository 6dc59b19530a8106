"""Removal of long metadata from PNG files, which Pillow refuses whole because of them.

Generators write their prompts into text chunks, and some editors a colour profile of several megabytes. Neither has an
influence on the pixels that are decoded here, so the chunk is left out in memory; the stored file keeps it.
"""

from __future__ import annotations

import struct
import zlib

from PIL import PngImagePlugin

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OVERHEAD = 12  # bytes of a chunk's length, type and checksum


def drop_long_metadata(data: bytes) -> bytes:
    """Leave out the text and colour profile chunks of a PNG that exceed Pillow's limits; other data is unchanged."""
    if not data.startswith(_SIGNATURE):
        return data
    kept, start, position, text_bytes = [], 0, len(_SIGNATURE), 0
    while position + _OVERHEAD <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + _OVERHEAD + length
        if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt") and end <= len(data):
            size = _unpacked_size(kind, data[position + 8 : end - 4])
            is_long = size > PngImagePlugin.MAX_TEXT_CHUNK
            if kind != b"iCCP" and not is_long:
                text_bytes += size
                is_long = text_bytes > PngImagePlugin.MAX_TEXT_MEMORY
            if is_long:
                kept.append(data[start:position])
                start = end
        position = end
    return b"".join((*kept, data[start:])) if kept else data


def _unpacked_size(kind: bytes, content: bytes) -> int:
    """Size of a chunk's content after unpacking; one more than the limit for anything longer."""
    packed = {b"iCCP": 2, b"zTXt": 2, b"iTXt": 3}.get(kind)  # keyword, NUL, (flag,) method
    if packed is None:
        return len(content)
    start = content.find(b"\0") + packed
    if kind == b"iTXt":  # after flag and method: language, NUL, translated keyword, NUL
        if content[start - 2 : start - 1] != b"\1":
            return len(content)
        start = content.find(b"\0", content.find(b"\0", start) + 1) + 1
    try:
        return len(zlib.decompressobj().decompress(content[start:], PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return len(content)  # Pillow ignores a damaged one

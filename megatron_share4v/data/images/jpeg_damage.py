"""Damage of a JPEG that decodes all the same: lost or shifted blocks, which libjpeg reports and Pillow does not."""

from __future__ import annotations

import re

try:
    import simplejpeg
except ImportError:  # installations of before it was required
    simplejpeg = None

CAN_CHECK = simplejpeg is not None
NOT_CHECKED = "JPEGs are not checked for damage that decodes: simplejpeg is not installed (pip install simplejpeg)"
# The others are about harmless fields of the header.
_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end|Inconsistent progression")


def find_jpeg_damage(data: bytes) -> str:
    """Return libjpeg's warning about the compressed data of a JPEG; "" without one, and for other formats.

    data: a file that has been decoded, so that its size is known to be acceptable.
    """
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return ""
    try:
        # At an eighth of the size: the compressed data is read in full, the pixels are not needed.
        simplejpeg.decode_jpeg(
            data, colorspace="GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, strict=True
        )
    except ValueError as error:
        return str(error) if _DAMAGE.search(str(error)) else ""
    return ""

"""Limits on the work of decoding one image, for files that are small but slow: scans of a JPEG, and CPU time.

A progressive JPEG costs a pass over the whole picture per scan, and an empty scan takes a dozen bytes: 600 kB can hold
minutes of work. The limits are the same in preparation, training, captioning and serving.
"""

from __future__ import annotations

import io
import re
import time

from megatron_share4v.data.images.policy import MAX_PIXELS, OversizedImage

MAX_SCANS = 100
"""Scans of one JPEG; encoders write about 10, or one."""
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
"""Pixels x scans of one JPEG: about 3 s of CPU time."""
MAX_SEGMENTS = 10_000
"""Marker segments of one JPEG."""
MAX_CPU_S = 20.0
"""CPU time to decode one image, checked whenever Pillow reads from the file."""

_EOI, _SOI, _SOS, _FIRST_WITH_LENGTH = 0xD9, 0xD8, 0xDA, 0xC0
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither stuffing (FF 00), nor restart (FF D0-D7), nor fill


class TimedFile(io.BytesIO):
    """Encoded image whose reads raise OversizedImage once its thread has spent MAX_CPU_S since it was opened."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._end = time.thread_time() + MAX_CPU_S

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes."""
        if time.thread_time() > self._end:
            raise OversizedImage(
                f"image takes more than {MAX_CPU_S:g} s of CPU time to decode; save it anew with another program "
                "or leave it out"
            )
        return super().read(size)


def count_jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG by its markers, without decoding; 0 for other formats.

    Raises OversizedImage for more scans or segments than accepted.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return 0
    scans = segments = 0
    place = 2
    while (found := _MARKER.search(data, place)) is not None:
        marker, place = data[found.end() - 1], found.end()
        if marker == _EOI:
            break
        if marker < _FIRST_WITH_LENGTH or marker == _SOI:
            continue
        place += int.from_bytes(data[place : place + 2])
        scans += marker == _SOS
        segments += 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            what = f"{MAX_SCANS} scans" if scans > MAX_SCANS else f"{MAX_SEGMENTS} segments"
            raise OversizedImage(
                f"image is a JPEG of more than {what}, which takes long to decode; save it anew with another program "
                "or leave it out"
            )
    return scans


def check_jpeg_scans(scans: int, *, width: int, height: int) -> None:
    """Raise OversizedImage when decoding that many scans of a picture of that size takes too long."""
    if scans * width * height > MAX_SCANNED_PIXELS:
        raise OversizedImage(
            f"image is a JPEG of {width} x {height} pixels in {scans} scans; accepted are {MAX_SCANNED_PIXELS} pixels "
            "over all scans. Save it as a baseline JPEG or leave it out"
        )

"""Images that are small but slow to decode: scans, segments and chunks without number; and a stand-in for a decoder."""

from __future__ import annotations

import io
import os
import struct
import sys
import time
import zlib

import numpy as np
from PIL import Image

from megatron_share4v.data.images.decode_pool import DecodeRequest


def scan_bomb(scans: int, *, width: int = 1000, height: int = 1000) -> bytes:
    """A progressive JPEG of one colour whose last scan, a dozen bytes, is repeated."""
    file = io.BytesIO()
    Image.new("L", (width, height), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def segment_bomb(segments: int) -> bytes:
    """A JPEG with that many empty comments."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    data = file.getvalue()
    return data[:2] + b"\xff\xfe\x00\x02" * segments + data[2:]


def comment_bomb(blocks: int) -> bytes:
    """A GIF whose comment has that many blocks of one byte."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "GIF")
    data = file.getvalue()
    place = 13 + (3 << (data[10] & 7) + 1)  # behind the palette
    return data[:place] + b"!\xfe" + b"\x01 " * blocks + b"\0" + data[place:]


def chunk_bomb(chunks: int) -> bytes:
    """A PNG with that many empty private chunks."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    data = file.getvalue()
    empty = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return data[:33] + empty * chunks + data[33:]


BOMBS = {
    "scans": lambda: scan_bomb(20_000),
    "pixels times scans": lambda: scan_bomb(60, width=6000, height=6000),
    "segments": lambda: segment_bomb(1_000_000),
}
"""Refused before decoding."""
SLOW = {"comment blocks": lambda: comment_bomb(10_000_000), "chunks": lambda: chunk_bomb(1_500_000)}
"""Refused when their CPU time is spent."""


def obey(request: DecodeRequest) -> np.ndarray:
    """Follow the instruction that stands in place of an image; runs in a process of decode_pool.py."""
    if request.data == b"hang":
        time.sleep(600)
    if request.data == b"die":
        os._exit(9)
    if request.data == b"torch":
        return np.frombuffer(b"torch is imported" if "torch" in sys.modules else b"torch is not imported", np.uint8)
    return np.frombuffer(request.data, dtype=np.uint8)

"""Whole pictures with long metadata are read, tall strips cost little, and files that are no image are named."""

from __future__ import annotations

import gzip
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from megatron_share4v.data.images.file_kind import describe_file
from megatron_share4v.data.images.pil_decoder import (
    FILTERS,
    decode,
    open_header,
    open_rgb,
    read_orientation,
    validate_image,
)
from megatron_share4v.data.images.png_metadata import drop_long_metadata
from megatron_share4v.data.images.policy import Filter, ImagePolicy
from megatron_share4v.data.images.tall_padding import resize_padded_width
from megatron_share4v.errors import DataError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes], at_end: bool = False) -> bytes:
    """Insert chunks after a PNG's header, or before its end."""
    place = len(data) - 12 if at_end else 33
    added = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:place] + added + data[place:]


LONG = bytes(3_000_000)
PICTURE = noise(31, 17)
METADATA = {
    "profile": with_chunks(saved(PICTURE, "PNG"), (b"iCCP", b"icc\0\0" + zlib.compress(LONG))),
    "compressed text": with_chunks(saved(PICTURE, "PNG"), (b"zTXt", b"prompt\0\0" + zlib.compress(LONG))),
    "compressed text at the end": with_chunks(
        saved(PICTURE, "PNG"), (b"zTXt", b"prompt\0\0" + zlib.compress(LONG)), at_end=True
    ),
    "international": with_chunks(saved(PICTURE, "PNG"), (b"iTXt", b"p\0\1\0en\0p\0" + zlib.compress(LONG))),
    "plain text": with_chunks(saved(PICTURE, "PNG"), (b"tEXt", b"prompt\0" + b"x" * 3_000_000)),
    "plain international": with_chunks(saved(PICTURE, "PNG"), (b"iTXt", b"p\0\0\0en\0p\0" + b"x" * 3_000_000)),
    "many": with_chunks(saved(PICTURE, "PNG"), *[(b"tEXt", b"k\0" + b"x" * 1_000_000)] * 70),
}


@pytest.mark.parametrize("name", METADATA)
def test_long_metadata_of_a_whole_picture_is_left_out(name: str) -> None:
    data = METADATA[name]
    assert validate_image(data).extension == "png"
    assert np.array_equal(np.asarray(open_rgb(data)), np.asarray(PICTURE))


def test_other_metadata_stays_in_place() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a cat", zip=True)
    exif = Image.Exif()
    exif[0x0112] = 8
    data = saved(PICTURE, "PNG", pnginfo=text, exif=exif, icc_profile=bytes(1000))
    assert drop_long_metadata(data) is data
    long = with_chunks(data, (b"zTXt", b"prompt\0\0" + zlib.compress(LONG)))
    assert drop_long_metadata(long) == data and read_orientation(open_header(long)) == 8
    jpeg = saved(PICTURE, "JPEG")
    assert drop_long_metadata(jpeg) is jpeg
    for end in (0, 8, 20, len(data) // 2):  # damaged files are Pillow's to name
        assert drop_long_metadata(data[:end]) == data[:end]


@pytest.mark.parametrize("width, height", [(1, 200), (10, 600), (37, 401), (255, 900), (500, 500), (7, 1399)])
@pytest.mark.parametrize("resample", list(FILTERS))
def test_tall_images_are_bit_equal_to_pillow(width: int, height: int, resample: Filter) -> None:
    colour = ImagePolicy(28).pad_colour
    for target in (28, 45, min(336, height)):
        image = noise(width, height, seed=width)
        canvas = Image.new("RGB", (height, height), colour)
        canvas.paste(image, ((height - width) // 2, 0))
        expected = canvas.resize((target, height), FILTERS[resample])
        got = resize_padded_width(image, side=height, size=target, resample=resample, colour=colour)
        assert np.array_equal(np.asarray(got), np.asarray(expected)), target


def test_the_tallest_strip_takes_seconds_and_no_gigabytes() -> None:
    data = saved(Image.new("L", (500, 100_000), 200), "PNG")
    started = time.process_time()
    pixels = decode(data, ImagePolicy(336))
    assert time.process_time() - started < 20  # the padded square has 10 billion pixels
    colour = ImagePolicy(336).pad_colour
    assert pixels[100, 168].tolist()[0] > colour[0] and pixels[100, 10].tolist() == list(colour)


NOT_IMAGES = {
    b"<!DOCTYPE html><html><head><title>404 Not\nFound</title>": "an HTML page ('404 Not Found')",
    b"\xef\xbb\xbf\n<html><body>": "an HTML page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "an XML document (error AccessDenied)",
    b'<?xml version="1.0"?><!-- x --><svg xmlns="http://www.w3.org/2000/svg">': "an SVG drawing",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n": "a Git LFS pointer",
    gzip.compress(b"x"): "gzip-compressed data",
    b"%PDF-1.4\n1 0 obj": "a PDF document",
    b"PK\x03\x04" + bytes(30): "a zip archive",
    b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200): "a HEIC/HEIF image",
    b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200): "an MP4 or QuickTime video",
    b"\xff\x0a" + bytes(60): "a JPEG XL image",
    b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(80): "an AppleDouble file",
    bytes(5000): "5000 zero bytes",
    b'{"error": "rate limit"}': "JSON text",
    "Fehler: zu groß".encode(): "text",
}


@pytest.mark.parametrize("data", NOT_IMAGES, ids=NOT_IMAGES.values())
def test_files_that_are_no_image_are_named(data: bytes) -> None:
    with pytest.raises(DataError, match="image cannot be read") as caught:
        validate_image(data)
    assert f"({len(data)} bytes, {NOT_IMAGES[data]}" in str(caught.value)


def test_unknown_bytes_have_no_name() -> None:
    assert describe_file(b"\x01\xfe\xc0junk") is None
    with pytest.raises(DataError, match="in no format that Pillow knows"):
        validate_image(b"\x01\xfe\xc0junk")
    assert describe_file(("ä" * 3000).encode()[:4097]) == "text"  # a character cut at the end of the sample

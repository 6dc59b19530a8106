"""Names for files that are no image: what a failed download, a repository or a phone leaves under an image's name."""

from __future__ import annotations

import re

# (position, first bytes, name), most specific first.
_SIGNATURES = (
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (0, b"\x1f\x8b", "gzip-compressed data: unpack it"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard-compressed data: unpack it"),
    (0, b"BZh", "bzip2-compressed data: unpack it"),
    (0, b"\xfd7zXZ\0", "xz-compressed data: unpack it"),
    (257, b"ustar", "a tar archive"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"\xff\x0a", "a JPEG XL image, which is not decoded here: convert it"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image, which is not decoded here: convert it"),
    (0, b"\x00\x05\x16\x07", "an AppleDouble file, the metadata of a file on a Mac, not the file itself"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\xff\xfe", "UTF-16 text"),
    (0, b"\xfe\xff", "UTF-16 text"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>([^<]{1,80})", re.IGNORECASE)
_SVG = re.compile(rb"<svg\b", re.IGNORECASE)
_CODE = re.compile(rb"<Code>([\w.-]{1,60})</Code>")
_IMAGE_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
)  # fmt: skip
SAMPLE = 4096
"""Bytes of a file that describe it."""


def begins_like_image(head: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of a format that is decoded."""
    is_webp, is_avif = head[:4] == b"RIFF" and head[8:12] == b"WEBP", head[4:12] in (b"ftypavif", b"ftypavis")
    return head.startswith(_IMAGE_SIGNATURES) or is_webp or is_avif


def describe_file(data: bytes) -> str | None:
    """Say what `data` is ("an HTML page", "a Git LFS pointer: ..."); None for an unknown kind."""
    for position, signature, name in _SIGNATURES:
        if data.startswith(signature, position):
            return name
    if data[4:8] == b"ftyp":
        is_heif = data[8:12] in _HEIF_BRANDS
        return "a HEIC/HEIF image, which is not decoded here: convert it" if is_heif else "an MP4 or QuickTime video"
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes: the file was never written, or was lost" if data else "an empty file"
    head = data[:SAMPLE].removeprefix(b"\xef\xbb\xbf").lstrip()
    if _HTML.match(head):
        title = _TITLE.search(head)
        return "an HTML page" + (f" ({_printable(title[1])!r})" if title else "")
    if head.startswith(b"<"):
        if _SVG.search(head):
            return "an SVG drawing, which has no pixels: convert it"
        code = _CODE.search(head)
        return "an XML document" + (f" (error {_printable(code[1])})" if code else "")
    if head.startswith((b"{", b"[")):
        return "JSON text"
    return "text" if _is_text(data[:SAMPLE]) else None


def _printable(text: bytes) -> str:
    return " ".join("".join(c for c in text.decode("utf-8", "replace") if c.isprintable() or c.isspace()).split())


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not merely a character cut at the end of the sample
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character.isspace() for character in text)

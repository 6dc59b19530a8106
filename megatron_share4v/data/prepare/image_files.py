"""Image folder as downloaded: files, and tar or zip archives that need not be unpacked.

An archive `a/b.tar` (or .zip) provides `a/b/<member>` and `a/<member>`: published archives contain a top-level folder,
or do not.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np

from megatron_share4v.data.store.shards import Member
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".jp2", ".j2k", ".jpx", ".jpf",
)  # fmt: skip
"""Suffixes of the formats that are decoded (EXTENSIONS of data/images/pil_decoder.py)."""
MAX_LISTED = 100_000  # names of a folder that are searched for one like a missing one
MEMBERS, PATHS = "members.npy", "paths.npy"
PREPARED = {"dataset.json", "journal.jsonl"}  # files that mark an output folder of writer.py
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# path: hash of the path below the folder; method: one of those below; stored: bytes on disk, length: bytes of the image
_MEMBER = np.dtype(
    [("path", "<u8"), ("archive", "<u2"), ("method", "u1"), ("offset", "<u8"), ("stored", "<u8"), ("length", "<u8")]
)
_RAW, _ZIP_STORED, _ZIP_DEFLATED, _UNREADABLE = range(4)
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class EncodedImage:
    """Encoded image file.

    archive: number of the archive that holds exactly these bytes at `offset`; None when there is none.
    """

    data: bytes
    archive: int | None = None
    offset: int = 0


class ImageFiles:
    """Reader of images of a folder by path.

    Pickles small: the table of archive members is in files that each process maps.
    """

    def __init__(self, root: Path, *, archives: tuple[str, ...], table: Path | None) -> None:
        """archives: paths below `root`; table: the folder that `scan_images` wrote, None without archives."""
        self.root, self.archives = root, archives
        self._table_path = table
        self._members = np.load(table / MEMBERS, mmap_mode="r") if table else np.empty(0, dtype=_MEMBER)
        self._paths = np.load(table / PATHS, mmap_mode="r") if table else self._members["path"]
        self._files: dict[int, int] = {}
        self._listings: dict[Path, dict[str, str]] = {}  # folder -> name by loose name

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _open_images, (self.root, self.archives, self._table_path)

    def read(self, path: str) -> EncodedImage:
        """Read the image at `path` (relative, as in records).

        Raises DataError when it is missing, unreadable or empty.
        """
        try:
            found = EncodedImage((self.root / path).read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            entry = self._entry(path)
            if entry is None:
                raise DataError(self._missing(path)) from error
            found = self._read_member(path, entry)
        except (OSError, ValueError) as error:
            raise DataError(
                f"image {self.root / path}: cannot be read ({error}); replace the file or leave the record out"
            ) from error
        if not found.data:
            raise DataError(f"image {self.root / path}: is an empty file; fetch it again or leave the record out")
        return found

    def close(self) -> None:
        """Close the archives; the next read opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _entry(self, path: str) -> np.void | None:
        name = np.uint64(_path_hash(path))
        place = int(np.searchsorted(self._paths, name))
        return self._members[place] if place < len(self._paths) and self._paths[place] == name else None

    def _read_member(self, path: str, entry: np.void) -> EncodedImage:
        number, method = int(entry["archive"]), int(entry["method"])
        where = f"image {path} in archive {self.root / self.archives[number]}"
        if method == _UNREADABLE:
            raise DataError(f"{where}: is encrypted or packed with a method other than deflate; unpack the archive")
        offset, stored = int(entry["offset"]), int(entry["stored"])
        if method != _RAW:
            signature, *variable = _LOCAL_HEADER.unpack(self._pread(number, _LOCAL_HEADER.size, offset, where=where))
            if signature != b"PK\3\4":
                raise DataError(f"{where}: has no header where the archive's directory says; fetch the archive again")
            offset += _LOCAL_HEADER.size + sum(variable)
        data = self._pread(number, stored, offset, where=where)
        return (
            EncodedImage(_inflated(data, int(entry["length"]), where=where))
            if method == _ZIP_DEFLATED
            else EncodedImage(data, number, offset)
        )

    def _pread(self, number: int, length: int, offset: int, *, where: str) -> bytes:
        if number not in self._files:
            try:
                self._files[number] = os.open(self.root / self.archives[number], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"{where}: the archive cannot be opened ({error.strerror})") from error
        data = os.pread(self._files[number], length, offset)
        if len(data) < length:
            raise DataError(f"{where}: the archive ends within it; fetch the archive again")
        return data

    def _missing(self, path: str) -> str:
        where = self.root / path
        others = [where.with_suffix(suffix) for suffix in SUFFIXES if suffix != where.suffix]
        near = [other.name for other in others if other.is_file()]
        if similar := self._find_similar(path):
            remedy = f"there is {similar} ({_difference(path, similar)}): correct the record"
        elif near:
            remedy = f"there is {near[0]} beside it: rename it, or correct the record"
        elif "\\" in path:
            remedy = "write / in place of \\"
        else:
            remedy = "fetch it or leave the record out"
        return f"image {where}: cannot be read (no such file{', nor in an archive' if self.archives else ''}); {remedy}"

    def _find_similar(self, path: str) -> str | None:
        """Path of a file whose name differs from `path` in case, slashes, blanks or the encoding of characters."""
        found = PurePosixPath()
        for part in PurePosixPath(path.replace("\\", "/")).parts:
            folder = self.root / found
            if folder not in self._listings:
                try:
                    with os.scandir(folder) as entries:
                        names = [entry.name for entry in islice(entries, MAX_LISTED)]
                except (OSError, ValueError):
                    return None
                self._listings[folder] = {_loose_name(name): name for name in names}
            name = self._listings[folder].get(_loose_name(part))
            if name is None:
                return None
            found /= name
        return str(found) if str(found) != path and (self.root / found).is_file() else None


def _loose_name(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name, errors="surrogateescape")).casefold().strip()


def _difference(path: str, similar: str) -> str:
    """Name what a path in a record has other than that of the file."""
    if "\\" in path:
        return "/ in place of \\"
    if path.casefold() == similar.casefold():
        return "another case of letters"
    if unicodedata.normalize("NFC", path) == unicodedata.normalize("NFC", similar):
        return "another Unicode form of the same characters"
    return "without blanks around it" if path.strip() == similar else "written another way"


def read_in_place(root: str | None, path: str | None, member: Member, *, key: str) -> bytes:
    """Read an image that was left in place when the data set was prepared.

    Raises DataError when it is missing or has changed since.
    """
    assert root is not None and path is not None, "the index says that the image was left in place"
    where = Path(root) / path
    try:
        data = where.read_bytes()
    except OSError as error:
        raise DataError(
            f"{where}:{key}: cannot be read ({error.strerror}); the data set was prepared with --in-place: "
            "restore the image"
        ) from error
    if len(data) != member.length or zlib.crc32(data) != member.crc32:
        raise DataError(
            f"{where}:{key}: is not the image that was prepared (crc32 or size differs); "
            "restore it or prepare the data set again"
        )
    return data


def find_archives(root: Path) -> list[Path]:
    """List the archives below `root`, sorted.

    Raises DataError for one that is compressed as a whole: its members cannot be read individually.
    """
    paths = sorted(path for path in _files_below(root) if path.name.endswith((".tar", ".zip", *COMPRESSED)))
    for path in paths:
        if path.name.endswith(COMPRESSED):
            raise DataError(
                f"archive {path}: is compressed as a whole, so images cannot be read individually; "
                "unpack it, or convert it to a plain .tar"
            )
    return paths


def scan_images(root: Path, *, table: Path, in_place: bool) -> ImageFiles:
    """List the archives below `root` and write the sorted table of their members into the folder `table`.

    The same images give the same table. Raises DataError for an archive that is damaged or compressed as a whole; with
    `in_place` also for one with compressed members, whose image bytes are not stored anywhere.
    """
    paths = find_archives(root)
    archives = tuple(path.relative_to(root).as_posix() for path in paths)
    parts = []
    for number, path in enumerate(paths):
        parts.append(_members(path, archives[number], number))
        if in_place and (parts[-1]["method"] > _ZIP_STORED).any():
            raise DataError(
                f"archive {path}: has compressed members, which cannot be used in place; "
                "unpack it, or leave out --in-place"
            )
        get_logger().info(f"archive {archives[number]}: {len(parts[-1]) // 2} members")
    if not archives:
        return ImageFiles(root, archives=(), table=None)
    members = np.concatenate(parts)
    members = members[np.argsort(members["path"], kind="stable")]
    table.mkdir(exist_ok=True)
    np.save(table / MEMBERS, members)
    np.save(table / PATHS, members["path"])  # a separate file: the binary search needs a contiguous column
    return ImageFiles(root, archives=archives, table=table)


def _open_images(root: Path, archives: tuple[str, ...], table: Path | None) -> ImageFiles:
    return ImageFiles(root, archives=archives, table=table)


def _files_below(root: Path) -> Iterator[Path]:
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()  # symbolic link cycle
            continue
        seen.add(real)
        if not PREPARED.isdisjoint(names):
            below.clear()  # our own shards, complete or partial
            continue
        yield from (Path(folder) / name for name in names)


def _members(path: Path, relative: str, number: int) -> np.ndarray:
    """Members of one archive, each under both of its paths."""
    parent, own = PurePosixPath(relative).parent, PurePosixPath(relative).with_suffix("")
    read = _zip_members if path.suffix == ".zip" else _tar_members
    rows = ((_path_hash(str(folder / name)), number, *place) for name, *place in read(path) for folder in (own, parent))
    try:
        return np.fromiter(rows, dtype=_MEMBER)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise DataError(f"archive {path}: is damaged ({error}); fetch it again") from error


class _StreamedTarFile(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # missing in the type stubs of tarfile


def _tar_members(path: Path) -> Iterator[tuple[str, int, int, int, int]]:
    end = path.stat().st_size
    with _StreamedTarFile.open(path, "r:") as tar:
        while member := tar.next():
            tar.members.clear()  # otherwise the whole list stays in memory
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"ends within {member.name}")
            if member.isreg() and not member.issparse():
                yield member.name, _RAW, member.offset_data, member.size, member.size


def _zip_members(path: Path) -> Iterator[tuple[str, int, int, int, int]]:
    methods = {zipfile.ZIP_STORED: _ZIP_STORED, zipfile.ZIP_DEFLATED: _ZIP_DEFLATED}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                method = _UNREADABLE if member.flag_bits & 1 else methods.get(member.compress_type, _UNREADABLE)
                yield member.filename, method, member.header_offset, member.compress_size, member.file_size


def _inflated(data: bytes, length: int, *, where: str) -> bytes:
    try:
        image = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length + 1)
    except zlib.error as error:
        raise DataError(f"{where}: cannot be unpacked ({error}); fetch the archive again") from error
    if len(image) != length:
        raise DataError(f"{where}: unpacks to another size than the archive's directory says; fetch the archive again")
    return image


def _path_hash(path: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(str(PurePosixPath(path)).encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )

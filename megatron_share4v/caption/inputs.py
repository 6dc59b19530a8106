"""Input images: lists (JSON, JSONL), folders, globs and tar archives become ImageEntries, in order, with stable ids.

An entry's path names it in the results. All paths are relative to one root, so that they can match those of a data
set's records.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from megatron_share4v.caption.records import ImageEntry
from megatron_share4v.data.prepare.image_files import COMPRESSED, SUFFIXES
from megatron_share4v.errors import DataError
from megatron_share4v.files import read_text

EntryFields = tuple[str | None, str, str, int, int | None]
"""Given id, path, file, offset, size: see ImageEntry."""


def read_image_entries(*, images_file: Path | None, images: Sequence[str], root: Path) -> list[ImageEntry]:
    """Entries of `images_file`, then of `images` (folders, globs, archives, files below `root`); duplicates are kept.

    An id is the list's own or the hash of the path; the k-th entry with the same id gets "~k". Raises DataError for an
    invalid list, a missing input, and an empty result.
    """
    entries: list[EntryFields] = []
    if images_file is not None:
        entries += _read_list(images_file, root)
    for item in images:
        entries += _expand_item(item, root)
    if not entries:
        raise DataError(
            f"{images_file or ', '.join(images)}: has no images; looked for {', '.join(SUFFIXES)} and .tar below {root}"
        )
    return list(_with_ids(entries))


def _with_ids(entries: Iterable[EntryFields]) -> Iterator[ImageEntry]:
    used: dict[str, int] = {}
    for given, path, file, offset, size in entries:
        first = given or hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        name, count = first, used.get(first, 0) + 1
        while count > 1 and (name := f"{first}~{count}") in used:
            count += 1
        used[first] = count
        used.setdefault(name, 1)
        yield ImageEntry(id=name, path=path, file=file, offset=offset, size=size)


def _read_list(path: Path, root: Path) -> Iterator[EntryFields]:
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); --images-file is a JSON list of image paths, or JSONL with one entry "
            "a line"
        ) from error
    try:
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: is not JSON ({error}); --images-file is a JSON list of image paths, or .jsonl with one entry a "
            "line"
        ) from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: holds a JSON {type(entries).__name__}; expected a list of image paths")
    for number, entry in enumerate(entries):
        name, image = (
            (entry.get("id"), entry.get("image", entry.get("path"))) if isinstance(entry, dict) else (None, entry)
        )
        if not isinstance(image, str) or not image:
            raise DataError(
                f"{path}, entry {number}: is {str(entry)[:60]!r}; expected an image path, or an object with 'image' "
                "and perhaps 'id'"
            )
        yield None if name is None else str(name), image, str(root / image), 0, None


def _expand_item(item: str, root: Path) -> Iterator[EntryFields]:
    if (root / item).exists():
        yield from _entries_at(item, root, explicit=True)
        return
    matches = sorted(glob.glob(item, root_dir=root, recursive=True)) if glob.has_magic(item) else []
    if not matches:
        raise DataError(
            f"--images {item}: no such file, folder or match below {root.resolve()}; quote a pattern, and mind "
            "--images-root"
        )
    for match in matches:
        yield from _entries_at(match, root, explicit=False)


def _entries_at(item: str, root: Path, *, explicit: bool) -> Iterator[EntryFields]:
    """Entries of one path. explicit: named by the user, so it counts as an image whatever its suffix."""
    path, lower = root / item, item.lower()
    if path.is_dir():
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                yield from _entries_at(
                    PurePosixPath(os.path.relpath(os.path.join(folder, name), root)).as_posix(), root, explicit=False
                )
    elif lower.endswith(COMPRESSED):
        raise DataError(
            f"archive {path}: is compressed as a whole, so that images cannot be read one by one; unpack it, or make "
            "it a plain .tar"
        )
    elif lower.endswith(".tar"):
        yield from _archive_members(item, path)
    elif explicit or lower.endswith((*SUFFIXES, ".tiff")):
        yield None, PurePosixPath(item).as_posix(), str(path), 0, None


def _archive_members(item: str, path: Path) -> Iterator[EntryFields]:
    """Members of an archive: `a/b.tar` has a/b/<member>, as in data preparation (data/prepare/image_files.py)."""
    folder = PurePosixPath(item).with_suffix("")
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # bounds memory: tarfile keeps every member
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"ends within {member.name}")
                if member.isreg() and not member.issparse() and member.name.lower().endswith((*SUFFIXES, ".tiff")):
                    yield None, str(folder / member.name), str(path), member.offset_data, member.size
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"archive {path}: is damaged ({error}); fetch it again") from error

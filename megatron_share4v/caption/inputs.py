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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from megatron_share4v.caption.records import ImageEntry
from megatron_share4v.data.images.file_kind import begins_like_image
from megatron_share4v.data.prepare.image_files import COMPRESSED, SUFFIXES
from megatron_share4v.data.prepare.record_keys import find_image
from megatron_share4v.errors import DataError
from megatron_share4v.files import read_text
from megatron_share4v.logging import get_logger

EntryFields = tuple[str | None, str, str, int, int | None]
"""Given id, path, file, offset, size: see ImageEntry."""
SHOWN_KINDS = 12


def read_image_entries(*, images_file: Path | None, images: Sequence[str], root: Path) -> list[ImageEntry]:
    """Entries of `images_file`, then of `images` (folders, globs, archives, files below `root`); duplicates are kept.

    An id is the list's own or the hash of the path; the k-th entry with the same id gets "~k". Raises DataError for an
    invalid list, a missing input, and an empty result.
    """
    entries: list[EntryFields] = []
    skipped: Counter[str] = Counter()
    if images_file is not None:
        entries += _read_list(images_file, root, skipped)
    for item in images:
        entries += _expand_item(item, root, skipped)
    left_out = ", ".join(f"{count} {name}" for name, count in skipped.most_common(SHOWN_KINDS))
    left_out += f" and {len(skipped) - SHOWN_KINDS} other kinds" if len(skipped) > SHOWN_KINDS else ""
    if not entries:
        raise DataError(
            f"{images_file or ', '.join(images)}: has no images{f' (but {left_out})' if left_out else ''}; looked for "
            f"{', '.join(SUFFIXES)} and .tar below {root}"
        )
    if skipped:
        get_logger().warning(
            "left out, because they are not read as images: %s; a file that --images or the list names itself is tried",
            left_out,
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


def _read_list(path: Path, root: Path, skipped: Counter[str]) -> Iterator[EntryFields]:
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); --images-file is a JSON list of image paths, or JSONL with one entry "
            "a line"
        ) from error
    try:
        entries = _parse_list(text, is_lines=path.suffix == ".jsonl")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: is not JSON ({error}); --images-file is a JSON list of image paths, or .jsonl with one entry a "
            "line"
        ) from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: holds a JSON {type(entries).__name__}; expected a list of image paths")
    for number, entry in enumerate(entries):
        name, image = entry.get("id") if isinstance(entry, dict) else None, entry
        if isinstance(entry, dict):
            image = find_image(entry)[1] or entry.get("path")
            if image is None and "conversations" in entry:
                skipped["text-only records"] += 1
                continue
        if not isinstance(image, str) or not image:
            raise DataError(
                f"{path}, entry {number}: is {str(entry)[:60]!r}; expected an image path, or an object with 'image' "
                "and perhaps 'id'"
            )
        yield None if name is None else str(name), image, str(root / image), 0, None


def _parse_list(text: str, *, is_lines: bool) -> object:
    """Parse a JSON document, or JSON Lines by the file's name or content. Raises ValueError, RecursionError."""
    try:
        if not is_lines:
            content = json.loads(text)
            return [content] if isinstance(content, dict) and find_image(content)[0] else content
    except ValueError:
        if not text.lstrip().startswith("{"):
            raise
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _expand_item(item: str, root: Path, skipped: Counter[str]) -> Iterator[EntryFields]:
    if os.path.exists(root / item):  # False for an unusable name as well
        yield from _entries_at(item, root, skipped, explicit=True)
        return
    matches = sorted(glob.glob(item, root_dir=root, recursive=True)) if glob.has_magic(item) else []
    if not matches:
        raise DataError(
            f"--images {item}: no such file, folder or match below {root.resolve()}; quote a pattern, and mind "
            "--images-root"
        )
    for match in matches:
        yield from _entries_at(match, root, skipped, explicit=False)


def _entries_at(item: str, root: Path, skipped: Counter[str], *, explicit: bool) -> Iterator[EntryFields]:
    """Entries of one path. explicit: named by the user, so it counts as an image whatever its suffix.

    skipped: counts files that are no images, by suffix.
    """
    path, lower = root / item, item.lower()
    if path.is_dir():
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                below_root = PurePosixPath(os.path.relpath(os.path.join(folder, name), root)).as_posix()
                yield from _entries_at(below_root, root, skipped, explicit=False)
    elif lower.endswith(COMPRESSED):
        raise DataError(
            f"archive {path}: is compressed as a whole, so that images cannot be read one by one; unpack it, or make "
            "it a plain .tar"
        )
    elif lower.endswith(".tar"):
        yield from _archive_members(item, path, skipped)
    elif explicit or lower.endswith(SUFFIXES) or (not path.suffix and _begins_like_image(path)):
        yield None, PurePosixPath(item).as_posix(), str(path), 0, None
    else:
        skipped[path.suffix.lower() or "without a suffix"] += 1


def _begins_like_image(path: Path, *, offset: int = 0) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return begins_like_image(file.read(12))
    except OSError:
        return False


def _archive_members(item: str, path: Path, skipped: Counter[str]) -> Iterator[EntryFields]:
    """Members of an archive: `a/b.tar` has a/b/<member>, as in data preparation (data/prepare/image_files.py)."""
    folder = PurePosixPath(item).with_suffix("")
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # bounds memory: tarfile keeps every member
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"ends within {member.name}")
                if not member.isreg() or member.issparse():
                    continue
                suffix = PurePosixPath(member.name).suffix.lower()
                if suffix in SUFFIXES or (not suffix and _begins_like_image(path, offset=member.offset_data)):
                    yield None, str(folder / member.name), str(path), member.offset_data, member.size
                else:
                    skipped[suffix or "without a suffix"] += 1
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"archive {path}: is damaged ({error}); fetch it again") from error

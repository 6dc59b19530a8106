"""Large directories written part by part beside their name and published by one rename; a write that was ended goes on where it stopped.

A part that the journal names is on the disk for good. Nothing half-written ever has the target's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from megatron_share4v.checkpoint.manifest import StoredFile, digest_of_ranges, fsync_directory
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger

SILENT_BYTES = 100_000_000
LARGE_BYTES = 1 << 20
SENT_BYTES = 32 << 20


@dataclass(frozen=True)
class OutputFile:
    """One file: its name inside the directory, about how many bytes it takes, and what writes it.

    `write` gets the file and a function to call with the number of bytes that were done; the object of JSON that it returns is kept in the journal.
    """

    name: str
    nbytes: int
    write: Callable[[HashingWriter, Callable[[int], Any]], dict[str, Any]]
    hashed: bool = True
    """Whether the SHA-256 of the file is wanted."""


@dataclass(frozen=True)
class WrittenFile:
    """A part that is done."""

    name: str
    size: int
    sha256: str
    """"" when it was not wanted."""
    ranges: tuple[int, ...] = field(default=(), kw_only=True)  # journals of earlier versions have none
    note: dict[str, Any]  # the last: the end of a whole line of the journal

    @property
    def stored(self) -> StoredFile:
        """What the manifest says of it."""
        return StoredFile(self.size, self.sha256, tuple(self.ranges))


class HashingWriter:
    """A file for writing. What goes into it is hashed, if wanted, and sent to the disk by other threads meanwhile: each takes as long as writing.

    A large piece that comes at once is hashed as a range of its own, all that is written between two of them as one (manifest.StoredFile).
    """

    def __init__(self, file: BinaryIO, *, hashed: bool, threads: ThreadPoolExecutor) -> None:
        self._file, self._threads = file, threads
        self._hashed, self._between, self._start = hashed, hashlib.sha256(), 0
        self._lengths: list[int] = []
        self._digests: list[str] = []
        self._unsent, self._sending = 0, threads.submit(lambda: None)

    def write(self, data: Any) -> int:
        """As a file's."""
        if len(data) < LARGE_BYTES:
            if self._hashed:
                self._between.update(data)
            return self._file.write(data)
        hashing = self._threads.submit(hashlib.sha256, data) if self._hashed else None
        self._end_between()
        try:
            count = self._file.write(data)
        finally:
            digest = None if hashing is None else hashing.result()  # before the caller uses the memory again
        if digest is not None:
            self._add(count, digest)
        self._unsent += count
        if self._unsent >= SENT_BYTES and self._sending.done():
            self._sending.result()
            self._unsent, self._sending = 0, self._threads.submit(os.fsync, self._file.fileno())
        return count

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()

    def tell(self) -> int:
        """As a file's."""
        return self._file.tell()

    def sha256_of_write(self, length: int, *, since: int) -> str | None:
        """SHA-256 of the one piece of `length` bytes that was written after offset `since`; None: it was not large enough to be hashed alone."""
        start = self._start
        for size, digest in zip(reversed(self._lengths), reversed(self._digests)):
            start -= size
            if start < since:
                return None
            if size == length and length >= LARGE_BYTES:
                return digest
        return None

    def finish(self) -> tuple[str, tuple[int, ...]]:
        """Everything to the disk; the SHA-256 over its ranges and their lengths, or "" and none when it was not wanted."""
        self._file.flush()
        self._sending.result()
        os.fsync(self._file.fileno())
        if not self._hashed:
            return "", ()
        self._end_between()
        if not self._lengths:  # no ranges would mean that the digest is of the content
            self._add(0, self._between)
        return digest_of_ranges(self._lengths, self._digests), tuple(self._lengths)

    def _end_between(self) -> None:
        if self._hashed and (length := self._file.tell() - self._start):
            self._add(length, self._between)
            self._between = hashlib.sha256()

    def _add(self, length: int, digest: hashlib._Hash) -> None:
        self._lengths.append(length)
        self._digests.append(digest.hexdigest())
        self._start += length


@dataclass(frozen=True)
class StagingDirectory:
    """Where a target is made: a directory beside it, and the journal of what is done."""

    path: Path
    journal: Path


@contextlib.contextmanager
def stage_directory(target: Path, *, fingerprint: str) -> Iterator[StagingDirectory]:
    """A workplace for the directory `target`, which gets its name when the block ends well.

    What an ended process left there is used again if its `fingerprint` (of everything that decides the content) is the same.
    Raises ConversionError when `target` is there already, at the end too, or another process is writing it; what is there is never touched.
    """
    _refuse_existing(target)
    staging = StagingDirectory(
        target.with_name(f".{target.name}.converting"), target.with_name(f".{target.name}.journal")
    )
    staging.path.mkdir(parents=True, exist_ok=True)
    with open(staging.journal, "a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConversionError(f"{target}: is being written by another process; wait for it") from error
        _refuse_existing(target)  # by a process that had the lock until now
        journal.seek(0)
        if journal.readline().rstrip("\n") != json.dumps(fingerprint):
            shutil.rmtree(staging.path)
            staging.path.mkdir()
            journal.truncate(0)
            _append(journal, fingerprint)
        elif not staging.journal.read_text(encoding="utf-8").endswith("\n"):
            journal.write("\n")  # after a last line that was cut short
            journal.flush()
        yield staging
        _flush(staging)
        _refuse_existing(target)
        try:
            os.rename(staging.path, target)
        except OSError as error:  # somebody was faster
            raise ConversionError(
                f"{target}: cannot be given its name ({error.strerror}); remove what is there, then start again"
            ) from error
        fsync_directory(target.parent)
        staging.journal.unlink()


def discard_staging(staging: StagingDirectory) -> None:
    """Forget what was written, because it turned out wrong: nothing of it may be taken for done later."""
    os.truncate(staging.journal, 0)
    shutil.rmtree(staging.path)
    staging.journal.unlink()


def file_states(paths: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """For a fingerprint: what changes when one of these files is written again, repaired or exchanged, even by one of the same size and age."""
    found = []
    for path in paths:
        status = path.stat()
        found.append((str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return found


def write_files(staging: StagingDirectory, parts: Sequence[OutputFile], *, title: str) -> dict[str, WrittenFile]:
    """Write those of `parts` that the journal does not have, with progress in bytes per second.

    Raises ConversionError, before anything is written, when the disk is too full.
    """
    directory = staging.path
    done = {
        name: written
        for name, written in _read_journal(staging.journal).items()
        if _size(directory / name) == written.size
    }
    left = [part for part in parts if part.name not in done]
    needed, free = sum(part.nbytes for part in left), shutil.disk_usage(directory).free
    if needed > free:
        raise ConversionError(
            f"{directory}: takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, then start again"
        )
    if done:
        get_logger().info("%s: goes on with %d of %d files already written", title, len(done), len(parts))
    total = sum(part.nbytes for part in parts)
    with tqdm(
        total=total,
        initial=total - needed,
        desc=title,
        unit="B",
        unit_scale=True,
        mininterval=1.0,
        disable=total < SILENT_BYTES,
    ) as bar:
        with ThreadPoolExecutor(1) as finishing:
            entered: Future[None] | None = None
            for part in left:
                # The disk is still busy with one part while the next one is begun.
                finish = _write(directory, part, bar.update)
                if entered is not None:
                    entered.result()
                entered = finishing.submit(_enter, staging, finish)
            if entered is not None:
                entered.result()
    done = _read_journal(staging.journal)
    return {part.name: done[part.name] for part in parts}


def _enter(staging: StagingDirectory, finish: Callable[[], WrittenFile]) -> None:
    written = finish()
    with open(staging.journal, "a", encoding="utf-8") as journal:
        _append(journal, asdict(written))


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConversionError(f"{target}: is there already; remove it or give another directory")


def _flush(staging: StagingDirectory) -> None:
    """To the disk: every file that is no part of the journal, which was flushed when it was entered, and every folder."""
    journaled = {staging.path / name for name in _read_journal(staging.journal)}
    entries = list(staging.path.rglob("*"))
    for path in entries:
        if path.is_file() and path not in journaled:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for folder in {staging.path, *(path for path in entries if path.is_dir())}:
        fsync_directory(folder)


def _write(directory: Path, part: OutputFile, progress: Callable[[int], Any]) -> Callable[[], WrittenFile]:
    """Write it, and leave what is to be called for its last bytes to reach the disk."""
    path = directory / part.name
    with _blaming(path), contextlib.ExitStack() as opened:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = opened.enter_context(open(path, "wb"))
        output = HashingWriter(file, hashed=part.hashed, threads=opened.enter_context(ThreadPoolExecutor(2)))
        note = part.write(output, progress)
        kept = opened.pop_all()

    def finish() -> WrittenFile:
        with _blaming(path), kept:
            sha256, ranges = output.finish()
            return WrittenFile(part.name, file.tell(), sha256, note, ranges=ranges)

    return finish


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """For an OSError: a message about the file that could not be read, or else about `path`, which could not be written."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(path)):
            raise ConversionError(
                f"{error.filename}: cannot be read ({error.strerror}); check where it lies, then start again"
            ) from error
        raise ConversionError(
            f"{path}: cannot be written ({error.strerror}); free space or check the file system, then start again"
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _read_journal(path: Path) -> dict[str, WrittenFile]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    # A line without its end is of a process that was killed while it wrote it.
    entries: list[Mapping[str, Any]] = [json.loads(line) for line in lines if line.endswith("}}")]
    return {entry["name"]: WrittenFile(**entry) for entry in entries}


def _append(journal: Any, content: Any) -> None:
    journal.write(json.dumps(content) + "\n")
    journal.flush()
    os.fsync(journal.fileno())

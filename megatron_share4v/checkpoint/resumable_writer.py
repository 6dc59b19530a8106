"""Write large directories file by file in a staging directory and publish them by one rename; an interrupted write
resumes.

A file named in the journal is complete and flushed to the disk. The target never holds a partial result.
"""

from __future__ import annotations

import contextlib
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
from megatron_share4v.errors import ConversionError, disk_errors_as_config_error
from megatron_share4v.files import append_json_lines, read_text, truncate_partial_line, try_lock
from megatron_share4v.logging import get_logger

PROGRESS_BYTES = 100_000_000
"""Smaller outputs show no progress bar."""
LARGE_BYTES = 1 << 20
"""Writes of at least this size are hashed as a range of their own."""
FSYNC_BYTES = 32 << 20
"""Unflushed bytes after which a background fsync starts."""


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its name in the directory, its approximate size, and the function that writes it.

    `write` receives the open file and a callback for the number of bytes done; the JSON object that it returns is kept
    in the journal as `note`.
    """

    name: str
    nbytes: int
    write: Callable[[HashingWriter, Callable[[int], Any]], dict[str, Any]]
    hashed: bool = True
    """Whether to compute the SHA-256 of the file."""


@dataclass(frozen=True)
class WrittenFile:
    """A finished file, as the journal stores it."""

    name: str
    size: int
    sha256: str
    """Empty when it was not computed."""
    ranges: tuple[int, ...] = field(default=(), kw_only=True)  # absent in journals of earlier versions
    note: dict[str, Any]  # last: a complete journal line ends with "}}"

    @property
    def stored(self) -> StoredFile:
        """The file's entry in the manifest."""
        return StoredFile(self.size, self.sha256, tuple(self.ranges))


class HashingWriter:
    """A file opened for writing; other threads hash its data and flush it to the disk meanwhile, each as slow as the
    write.

    A write of at least LARGE_BYTES is hashed as a range of its own, all smaller writes between two of them as one range
    (manifest.StoredFile).
    """

    def __init__(self, file: BinaryIO, *, hashed: bool, threads: ThreadPoolExecutor) -> None:
        self._file, self._threads = file, threads
        self._hashed, self._small_writes, self._start = hashed, hashlib.sha256(), 0
        self._lengths: list[int] = []
        self._digests: list[str] = []
        self._unflushed, self._flushing = 0, threads.submit(lambda: None)

    def write(self, data: Any) -> int:
        """Write data (see `io.RawIOBase.write`)."""
        if len(data) < LARGE_BYTES:
            if self._hashed:
                self._small_writes.update(data)
            return self._file.write(data)
        hashing = self._threads.submit(hashlib.sha256, data) if self._hashed else None
        self._end_small_writes()
        try:
            count = self._file.write(data)
        finally:
            digest = None if hashing is None else hashing.result()  # before the caller reuses the memory
        if digest is not None:
            self._add_range(count, digest)
        self._unflushed += count
        if self._unflushed >= FSYNC_BYTES and self._flushing.done():
            self._flushing.result()
            self._unflushed, self._flushing = 0, self._threads.submit(os.fsync, self._file.fileno())
        return count

    def flush(self) -> None:
        """Flush Python's buffer (see `io.IOBase.flush`)."""
        self._file.flush()

    def tell(self) -> int:
        """Return the current offset (see `io.IOBase.tell`)."""
        return self._file.tell()

    def sha256_of_write(self, length: int, *, since: int) -> str | None:
        """Return the SHA-256 of the write of `length` bytes after offset `since`; None when it was not hashed
        separately.
        """
        start = self._start
        for size, digest in zip(reversed(self._lengths), reversed(self._digests)):
            start -= size
            if start < since:
                return None
            if size == length and length >= LARGE_BYTES:
                return digest
        return None

    def finish(self) -> tuple[str, tuple[int, ...]]:
        """Flush everything to the disk; return the SHA-256 over the ranges and their lengths ("" and () when not
        hashed).
        """
        self._file.flush()
        self._flushing.result()
        os.fsync(self._file.fileno())
        if not self._hashed:
            return "", ()
        self._end_small_writes()
        if not self._lengths:  # without ranges, the manifest's hash would be of the content
            self._add_range(0, self._small_writes)
        return digest_of_ranges(self._lengths, self._digests), tuple(self._lengths)

    def _end_small_writes(self) -> None:
        if self._hashed and (length := self._file.tell() - self._start):
            self._add_range(length, self._small_writes)
            self._small_writes = hashlib.sha256()

    def _add_range(self, length: int, digest: hashlib._Hash) -> None:
        self._lengths.append(length)
        self._digests.append(digest.hexdigest())
        self._start += length


@dataclass(frozen=True)
class StagingDirectory:
    """The hidden directory beside a target in which it is written, and the journal of its finished files."""

    path: Path
    journal: Path


@contextlib.contextmanager
def stage_directory(target: Path, *, fingerprint: str) -> Iterator[StagingDirectory]:
    """Yield the staging directory of `target`, which is renamed to `target` when the block ends without an exception.

    Files of an interrupted process are reused if its `fingerprint` (of everything that determines the content) is
    equal. Raises ConversionError when `target` exists, at the start or the end, or another process is writing it; an
    existing target is never changed.
    """
    _refuse_existing(target)
    staging = StagingDirectory(
        target.with_name(f".{target.name}.converting"), target.with_name(f".{target.name}.journal")
    )
    with disk_errors_as_config_error(target.parent):
        staging.path.mkdir(parents=True, exist_ok=True)
        journal = open(staging.journal, "a+b")  # noqa: SIM115  (closed below)
    with journal:
        if try_lock(journal) is False:
            raise ConversionError(f"{target}: is being written by another process; wait for it")
        _refuse_existing(target)  # published by a process that held the lock until now
        truncate_partial_line(staging.journal)
        journal.seek(0)
        if journal.readline().decode().rstrip("\n") != json.dumps(fingerprint):
            shutil.rmtree(staging.path)
            staging.path.mkdir()
            journal.truncate(0)
            append_json_lines(journal, [fingerprint], durable=True)
        yield staging
        _fsync_tree(staging)
        _refuse_existing(target)
        try:
            os.rename(staging.path, target)
        except OSError as error:  # another process published it first
            raise ConversionError(
                f"{target}: the finished directory cannot be renamed to it ({error.strerror}); "
                "remove what is there, then start again"
            ) from error
        fsync_directory(target.parent)
        staging.journal.unlink()


def discard_staging(staging: StagingDirectory) -> None:
    """Delete staged files whose input turned out damaged, so that a later run does not reuse them."""
    os.truncate(staging.journal, 0)
    shutil.rmtree(staging.path)
    staging.journal.unlink()


def file_states(paths: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """Return (path, size, mtime, ctime, inode) of files for a fingerprint.

    The result changes when a file is rewritten, repaired or replaced, even by one of the same size and modification
    time.
    """
    found = []
    for path in paths:
        status = path.stat()
        found.append((str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return found


def write_files(staging: StagingDirectory, files: Sequence[OutputFile], *, title: str) -> dict[str, WrittenFile]:
    """Write the files that the journal does not list yet, with a progress bar; return all by name.

    Raises ConversionError before anything is written when the disk has too little space.
    """
    directory = staging.path
    done = {
        name: written
        for name, written in _read_journal(staging.journal).items()
        if _size(directory / name) == written.size
    }
    left = [file for file in files if file.name not in done]
    needed, free = sum(file.nbytes for file in left), shutil.disk_usage(directory).free
    if needed > free:
        raise ConversionError(
            f"{directory}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; free space, then start again"
        )
    if done:
        get_logger().info("%s: resumes with %d of %d files already written", title, len(done), len(files))
    total = sum(file.nbytes for file in files)
    with tqdm(
        total=total,
        initial=total - needed,
        desc=title,
        unit="B",
        unit_scale=True,
        mininterval=1.0,
        disable=total < PROGRESS_BYTES,
    ) as bar:
        with ThreadPoolExecutor(1) as finishing:
            recorded: Future[None] | None = None
            for file in left:
                # The disk still flushes one file while the next one is started.
                finish = _write(directory, file, bar.update)
                if recorded is not None:
                    recorded.result()
                recorded = finishing.submit(_record, staging, finish)
            if recorded is not None:
                recorded.result()
    done = _read_journal(staging.journal)
    return {file.name: done[file.name] for file in files}


def _record(staging: StagingDirectory, finish: Callable[[], WrittenFile]) -> None:
    """Finish a file, then add it to the journal."""
    written = finish()
    with open(staging.journal, "ab") as journal:
        append_json_lines(journal, [asdict(written)], durable=True)


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConversionError(f"{target}: exists already; remove it or give another directory")


def _fsync_tree(staging: StagingDirectory) -> None:
    """Flush every folder and every file that is not in the journal; those in the journal were flushed before."""
    journaled = {staging.path / name for name in _read_journal(staging.journal)}
    entries = list(staging.path.rglob("*"))
    for path in entries:
        if path.is_file() and path not in journaled:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for folder in {staging.path, *(path for path in entries if path.is_dir())}:
        fsync_directory(folder)


def _write(directory: Path, task: OutputFile, progress: Callable[[int], Any]) -> Callable[[], WrittenFile]:
    """Write a file; return the function that flushes its last bytes to the disk and closes it."""
    path = directory / task.name
    with _os_errors_as_conversion_error(path), contextlib.ExitStack() as opened:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = opened.enter_context(open(path, "wb"))
        output = HashingWriter(file, hashed=task.hashed, threads=opened.enter_context(ThreadPoolExecutor(2)))
        note = task.write(output, progress)
        kept = opened.pop_all()

    def finish() -> WrittenFile:
        with _os_errors_as_conversion_error(path), kept:
            sha256, ranges = output.finish()
            return WrittenFile(task.name, file.tell(), sha256, note, ranges=ranges)

    return finish


@contextlib.contextmanager
def _os_errors_as_conversion_error(path: Path) -> Iterator[None]:
    """Raise an OSError as ConversionError about the file that could not be read, or else about writing `path`."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(path)):
            raise ConversionError(
                f"{error.filename}: cannot be read ({error.strerror}); check its file system, then start again"
            ) from error
        raise ConversionError(
            f"{path}: cannot be written ({error.strerror}); free space or check the file system, then start again"
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _read_journal(path: Path) -> dict[str, WrittenFile]:
    lines = read_text(path).splitlines()[1:]
    # A line without "}}" was cut short by a kill.
    entries: list[Mapping[str, Any]] = [json.loads(line) for line in lines if line.endswith("}}")]
    return {entry["name"]: WrittenFile(**entry) for entry in entries}

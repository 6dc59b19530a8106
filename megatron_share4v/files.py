"""File primitives that the whole package shares: text files, atomic writes, advisory locks, JSON lines that survive a
kill.

Nothing here knows what a file means. Errors of the operating system pass through; callers turn them into user errors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

NO_LOCK_SUPPORT = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""What flock raises on a file system without it (Lustre mounted without `flock`, NFS without its lock service)."""


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", *, durable: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and rename it to `path` when the block ends without an exception.

    A reader of `path` finds the old content or the new one, never a part. After an exception the temporary file is
    removed and `path` is unchanged. Text is UTF-8. `durable` also flushes to the disk (fsync) before the rename.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace `path` by a UTF-8 file with this text, atomically (see `atomic_write`)."""
    with atomic_write(path, durable=durable) as file:
        file.write(text)


def atomic_write_json(path: Path, content: object, *, durable: bool = False) -> None:
    """Replace `path` by this object as indented JSON with a final newline, atomically (see `atomic_write`)."""
    atomic_write_text(path, json.dumps(content, indent=1) + "\n", durable=durable)


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Read a UTF-8 text file without its byte-order mark, which editors on Windows and spreadsheets put at the start.

    All text of the project is read with this. errors: as of `bytes.decode`.
    """
    return path.read_text(encoding="utf-8-sig", errors=errors)


def try_lock(file: IO[Any]) -> bool | None:
    """Take an exclusive advisory lock on an open file without waiting.

    Returns True when it is held now (until the file is closed or the process ends), False when another process holds
    it, and None when the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCK_SUPPORT:
            return None
        raise
    return True


def wait_for_lock(file: IO[Any]) -> None:
    """Take an exclusive advisory lock on an open file, waiting as long as another process holds it."""
    fcntl.flock(file, fcntl.LOCK_EX)


def append_json_lines(file: IO[bytes], rows: Iterable[object], *, durable: bool = False) -> None:
    """Append one JSON line per row to a file opened in binary mode, in one write, and flush it."""
    file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    file.flush()
    if durable:
        os.fsync(file.fileno())


def truncate_partial_line(path: Path) -> int:
    """Cut off a last line without its newline, as a kill or a full disk leaves it; return the size that remains.

    Returns 0 for a missing file.
    """
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end, step = size, 1 << 16
        while end > 0:
            start = max(0, end - step)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
    return end

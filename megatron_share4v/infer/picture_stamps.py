"""Stamps of the pictures behind journaled results, so that a resumed job notices a picture that changed under its name.

A stamp is the hash of the encoded bytes with size and modification time of the file. A resumed job compares size and
time first and reads the bytes only where these differ: copying or touching the pictures changes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

WORKERS = 8
_DIGEST_BYTES = 12


class Named(Protocol):
    """An input with an id."""

    @property
    def id(self) -> str:
        """Unique id of the input."""
        ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True, slots=True)
class PictureSource:
    """Where the encoded bytes of a picture are: `size` bytes of `file` from `offset` (all from there for None), or
    `data`.
    """

    file: str = ""
    offset: int = 0
    size: int | None = None
    data: bytes | None = None


class PictureStamps:
    """Stamps of the pictures of one job, computed in threads of their own."""

    def __init__(self, source_of: Callable[[str], PictureSource | None]) -> None:
        """source_of: maps an id to its picture; None for an input without a picture or an unknown id."""
        self._source_of = source_of
        self._pool = ThreadPoolExecutor(WORKERS)
        self._running: dict[str, Future[str | None]] = {}

    def watch(self, inputs: Iterable[T]) -> Iterator[T]:
        """Yield `inputs`, and begin to stamp the picture of each before it is used."""
        for one in inputs:
            self._running[one.id] = self._pool.submit(self._stamp, one.id)
            yield one

    def take(self, name: str) -> str | None:
        """Return the stamp of an input that `watch` has yielded; None when its picture is absent or unreadable."""
        future = self._running.pop(name, None)
        return None if future is None else future.result()

    def find_changed(self, stamps: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Return those of the (id, stamp) whose picture has other bytes now.

        A picture that is not there any more has not changed.
        """
        changed = self._pool.map(lambda entry: self._has_changed(*entry), stamps)
        return {entry for entry, has_changed in zip(stamps, changed) if has_changed}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _stamp(self, name: str) -> str | None:
        source = self._source_of(name)
        if source is None:
            return None
        try:
            status = _status(source)  # before the bytes: a change in between is noticed later
            return f"{_digest(source)}:{status}"
        except OSError:
            return None

    def _has_changed(self, name: str, stamp: str) -> bool:
        source = self._source_of(name)
        digest, _, status = stamp.partition(":")
        try:
            if source is None or (status and _status(source) == status):
                return False
            return _digest(source) != digest
        except OSError:
            return False


def _status(source: PictureSource) -> str:
    """Size and modification time of the file; empty for bytes in memory."""
    if source.data is not None:
        return ""
    status = os.stat(source.file)
    return f"{status.st_size}:{status.st_mtime_ns}"


def _digest(source: PictureSource) -> str:
    data = source.data
    if data is None:
        with Path(source.file).open("rb") as file:
            file.seek(source.offset)
            data = file.read() if source.size is None else file.read(source.size)
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()

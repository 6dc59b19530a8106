"""Results finished so far, on disk: one append-only JSON-lines file per rank, with an fsync per append.

A killed job, restarted with any number of ranks, resumes after the last complete line of each file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_share4v.errors import DataError
from megatron_share4v.files import try_lock
from megatron_share4v.infer.picture_stamps import PictureStamps
from megatron_share4v.logging import get_logger

_FILE_BITS = 20
_CHUNK = 4096
"""Rows whose pictures are checked together."""
STAMP = "picture"
"""Field of a line with the stamp of the row's picture (see picture_stamps.py); not a field of the row."""
Stamped = tuple[str, str]
"""Id and stamp of a row."""
R = TypeVar("R")
"""Row type: a dataclass of plain values with `id` and `error` (None for an answer)."""


@dataclass(frozen=True)
class DPGroup:
    """Position of this process among the DP replicas that share a job. barrier: waits for all of them."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = lambda: None


class AnswerLog:
    """`directory`/rank<N>.jsonl of one process: a header line that identifies the job, then one line per row."""

    def __init__(self, directory: Path, *, rank: int) -> None:
        """Open and lock the file. Raises DataError when another process has it locked."""
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"rank{rank}.jsonl"
        self._file = self.path.open("ab")
        if not try_lock(self._file):
            raise DataError(
                f"{self.path}: another process is at this job; wait for it, stop it, or write to another path"
            )

    def begin(self, job: dict[str, object], *, restart: bool) -> None:
        """Truncate an incomplete last line, or everything with `restart`; write the header into an empty file."""
        whole = 0 if restart else self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)
        if not whole:
            self._append([{"job": job}])

    def append(self, rows: Iterable[Any], *, stamps: PictureStamps | None = None) -> None:
        """Append rows, with the stamps of their pictures if given, and fsync."""
        lines = []
        for row in rows:
            stamp = stamps.take(row.id) if stamps else None
            lines.append(asdict(row) | ({} if stamp is None else {STAMP: stamp}))
        self._append(lines)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def _append(self, lines: Sequence[dict[str, object]]) -> None:
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())


class AnswerIndex(Generic[R]):
    """Rows of all logs in a directory by id: an answer takes precedence over an error, a later row over an earlier one.

    Rows whose picture has changed since do not count. Keeps file offsets, not contents: about 150 bytes per row.
    """

    def __init__(
        self,
        directory: Path,
        *,
        job: dict[str, object],
        row: type[R],
        find_changed: Callable[[Sequence[Stamped]], set[Stamped]] = lambda stamped: set(),
    ) -> None:
        """Scan the logs. Raises DataError when one belongs to another job or is damaged before its last line.

        find_changed: returns those of the (id, stamp) of rows whose picture has changed; `changed` collects them.
        """
        self._row, self._find_changed = row, find_changed
        self.changed: set[Stamped] = set()
        self._paths = sorted(directory.glob("rank*.jsonl"))
        assert len(self._paths) < 1 << _FILE_BITS
        self._locations: dict[str, int] = {}
        self.errors: set[str] = set()
        for number, path in enumerate(self._paths):
            self._scan(number, path, job)

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def rows(self, ids: Iterable[str]) -> Iterator[R]:
        """Yield the rows of `ids`, in their order. Raises DataError for an id without a row."""
        files = [path.open("rb") for path in self._paths]
        try:
            for name in ids:
                location = self._locations.get(name)
                if location is None:
                    raise DataError(
                        f"{name!r} has no result: its picture changed while the job ran; start the same command again"
                    )
                file = files[location & ((1 << _FILE_BITS) - 1)]
                file.seek(location >> _FILE_BITS)
                content = json.loads(file.readline())
                content.pop(STAMP, None)
                yield self._row(**content)
        finally:
            for file in files:
                file.close()

    def _scan(self, number: int, path: Path, job: dict[str, object]) -> None:
        entries: list[_Entry] = []
        with path.open("rb") as file:
            offset = 0
            for count, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    content = json.loads(line)
                    if count > 1:
                        location = offset << _FILE_BITS | number
                        entries.append(_Entry(content["id"], content["error"], content.get(STAMP), location))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{path}:{count}: is damaged ({error}); remove this line, or start over with --restart"
                    ) from error
                if count == 1:
                    _check_job(path, content.get("job"), job)
                if len(entries) == _CHUNK:
                    self._index_rows(entries)
                    entries = []
                offset += len(line)
        self._index_rows(entries)

    def _index_rows(self, entries: Sequence[_Entry]) -> None:
        changed = self._find_changed([(each.name, each.stamp) for each in entries if each.stamp is not None])
        self.changed |= changed
        for each in entries:
            if (each.name, each.stamp) in changed:
                continue
            if each.error is not None and each.name in self._locations and each.name not in self.errors:
                continue
            self._locations[each.name] = each.location
            (self.errors.discard if each.error is None else self.errors.add)(each.name)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Row of a log. location: offset and number of its file."""

    name: str
    error: str | None
    stamp: str | None
    location: int


def resume_answer_log(
    journal: AnswerLog,
    *,
    job: dict[str, object],
    row: type[R],
    share: DPGroup,
    restart: bool,
    stamps: PictureStamps | None = None,
) -> AnswerIndex[R]:
    """Start the log and index what is done of `job`; `restart` discards all earlier rows. Raises DataError.

    stamps: rows whose picture has changed since do not count as done; rank 0 logs their number.
    """
    directory = journal.path.parent
    if restart and share.rank == 0:
        own = {f"rank{rank}.jsonl" for rank in range(share.size)}
        for path in directory.glob("rank*.jsonl"):
            if path.name not in own:
                path.unlink()
    journal.begin(job, restart=restart)
    share.barrier()
    if stamps is None:
        return AnswerIndex(directory, job=job, row=row)
    done = AnswerIndex(directory, job=job, row=row, find_changed=stamps.find_changed)
    if share.rank == 0 and (again := sorted({name for name, _ in done.changed if name not in done})):
        get_logger().warning(
            "%d pictures have changed since their results were made, the first of %r; these results are made again",
            len(again),
            again[0],
        )
    return done


def _check_job(path: Path, found: object, job: dict[str, object]) -> None:
    if found == job:
        return
    before = found if isinstance(found, dict) else {}
    differences = [
        f"{name} was {before.get(name)!r}, now {job.get(name)!r}"
        for name in sorted({*before, *job})
        if before.get(name) != job.get(name)
    ]
    raise DataError(
        f"{path}: belongs to a job with other settings: {'; '.join(differences)}. Use those, start over with "
        "--restart, or write to another path"
    )

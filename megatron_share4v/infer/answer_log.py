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

_FILE_BITS = 20
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

    def append(self, rows: Iterable[Any]) -> None:
        """Append rows and fsync."""
        self._append([asdict(row) for row in rows])

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def _append(self, lines: Sequence[dict[str, object]]) -> None:
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())


class AnswerIndex(Generic[R]):
    """Rows of all logs in a directory by id: an answer takes precedence over an error, a later row over an earlier one.

    Keeps file offsets, not contents: about 150 bytes per row.
    """

    def __init__(self, directory: Path, *, job: dict[str, object], row: type[R]) -> None:
        """Scan the logs. Raises DataError when one belongs to another job or is damaged before its last line."""
        self._row = row
        self._paths = sorted(directory.glob("rank*.jsonl"))
        assert len(self._paths) < 1 << _FILE_BITS
        self._locations: dict[str, int] = {}
        self.errors: set[str] = set()
        for number, path in enumerate(self._paths):
            self._scan(number, path, job)

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def rows(self, ids: Iterable[str]) -> Iterator[R]:
        """Yield the rows of `ids`, in their order."""
        files = [path.open("rb") for path in self._paths]
        try:
            for name in ids:
                location = self._locations[name]
                file = files[location & ((1 << _FILE_BITS) - 1)]
                file.seek(location >> _FILE_BITS)
                yield self._row(**json.loads(file.readline()))
        finally:
            for file in files:
                file.close()

    def _scan(self, number: int, path: Path, job: dict[str, object]) -> None:
        with path.open("rb") as file:
            offset = 0
            for count, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    content = json.loads(line)
                    if count > 1:
                        self._index_row(content["id"], content["error"], offset << _FILE_BITS | number)
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{path}:{count}: is damaged ({error}); remove this line, or start over with --restart"
                    ) from error
                if count == 1:
                    _check_job(path, content.get("job"), job)
                offset += len(line)

    def _index_row(self, name: str, error: str | None, location: int) -> None:
        if error is not None and name in self._locations and name not in self.errors:
            return
        self._locations[name] = location
        (self.errors.discard if error is None else self.errors.add)(name)


def resume_answer_log(
    journal: AnswerLog, *, job: dict[str, object], row: type[R], share: DPGroup, restart: bool
) -> AnswerIndex[R]:
    """Start the log and index what is done of `job`; `restart` discards all earlier rows. Raises DataError."""
    directory = journal.path.parent
    if restart and share.rank == 0:
        own = {f"rank{rank}.jsonl" for rank in range(share.size)}
        for path in directory.glob("rank*.jsonl"):
            if path.name not in own:
                path.unlink()
    journal.begin(job, restart=restart)
    share.barrier()
    return AnswerIndex(directory, job=job, row=row)


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

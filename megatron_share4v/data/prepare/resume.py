"""Journal of a preparation on disk, so that a killed one resumes after its last finished shard.

Append-only files, and a line in journal.jsonl per finished shard; data after the last line is truncated on resume.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_share4v.data.prepare.growing_array import GrowingArray
from megatron_share4v.data.store.index import ROW, ShardFile
from megatron_share4v.errors import DataError
from megatron_share4v.files import read_text, try_lock

REJECTED = "rejected.jsonl"
NAME, ROWS, KEYS = "journal.jsonl", "rows.bin", "keys.txt"
PATH_BYTES = 12
NO_PATH = bytes(PATH_BYTES)
KEPT_ROW = np.dtype(
    [*ROW.descr, ("identity", "<u8"), ("path", f"V{PATH_BYTES}")]
)  # index row, hash of the turns, hash of the image's path


class Journal:
    """State of a preparation in `directory`; rows and keys are also in memory, about 200 bytes per sample.

    entries: processed annotation records. shards: finished shards. rejected: counts by kind. keys: keys of all samples.
    sources: counts by (source, "samples" | "rejected" | "images"). unread: records by key that is not read.
    damaged: JPEGs that decode with lost blocks. rows: [samples] of KEPT_ROW.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries = 0
        self.shards: list[ShardFile] = []
        self.sources: Counter[tuple[str, str]] = Counter()
        self.rejected: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.damaged = 0
        self.keys: list[str] = []
        self._table = GrowingArray(KEPT_ROW)
        self._written = 0
        self._files = {name: (directory / name).open("ab") for name in (NAME, ROWS, KEYS, REJECTED)}

    @staticmethod
    def open(directory: Path, *, identity: dict[str, object], restart: bool = False) -> Journal:
        """Start or resume the preparation that `identity` describes; `restart` discards an unfinished one.

        Raises DataError when another process is preparing there, or when the unfinished preparation has another
        identity: the message names each difference.
        """
        directory.mkdir(parents=True, exist_ok=True)
        journal = Journal(directory)
        if not try_lock(journal._files[NAME]):
            raise DataError(f"{directory}: another process is preparing this data set; wait for it or stop it")
        if restart:
            journal._files[NAME].truncate(0)
        lines = _complete_lines(directory / NAME)
        if len(lines) == 1 and lines[0] != identity:  # no shard is finished: nothing is lost by starting over
            journal._files[NAME].truncate(0)
            lines = []
        if lines and lines[0] != identity:
            differences = [
                f"{name} was {lines[0].get(name)!r}, now {identity[name]!r}"
                for name in identity
                if lines[0].get(name) != identity[name]
            ]
            raise DataError(
                f"{directory} holds an unfinished preparation with other inputs: {'; '.join(differences)}. "
                "Finish it with those, or start over with --restart"
            )
        journal._restore(lines[1:])
        if not lines:
            journal._append(NAME, json.dumps(identity).encode() + b"\n")
        return journal

    @property
    def rows(self) -> np.ndarray:
        """[samples] of KEPT_ROW."""
        return self._table.rows

    def add(self, key: str, row: tuple[object, ...]) -> None:
        """Append one sample."""
        self._table.append(row)
        self.keys.append(key)

    def reject(self, line: dict[str, object]) -> None:
        """Append one rejected record; `line` holds its "kind"."""
        self.rejected[str(line["kind"])] += 1
        self._files[REJECTED].write(json.dumps(line).encode() + b"\n")

    def commit(self, shard: ShardFile) -> None:
        """Record `shard` as finished and make everything added so far durable."""
        self.shards.append(shard)
        self._append(ROWS, self.rows[self._written :].tobytes())
        self._append(KEYS, "".join(f"{key}\n" for key in self.keys[self._written :]).encode())
        self._append(REJECTED, b"")
        self._written = len(self.keys)
        state = {
            "entries": self.entries,
            "samples": self._written,
            "sizes": {name: self._files[name].tell() for name in (ROWS, KEYS, REJECTED)},
            "shard": [shard.name, shard.size],
            "sources": [[*name, count] for name, count in sorted(self.sources.items())],
            "rejected": dict(sorted(self.rejected.items())),
            "unread": dict(sorted(self.unread.items())),
            "damaged": self.damaged,
        }
        self._append(NAME, json.dumps(state).encode() + b"\n")

    def close(self) -> None:
        """Close the files and release the lock."""
        for file in self._files.values():
            file.close()

    def remove(self) -> None:
        """Close, and delete the files that only serve resuming."""
        self.close()
        for name in (NAME, ROWS, KEYS):
            (self.directory / name).unlink()

    def _restore(self, states: list[dict]) -> None:
        """Restore the state of the last finished shard and truncate later data."""
        for state in states:
            name, size = state["shard"]
            path = self.directory / name
            if not path.is_file() or path.stat().st_size != size:
                raise DataError(f"{path}: has changed since it was finished; start over with --restart")
            self.shards.append(ShardFile(name=name, size=size))
        state = states[-1] if states else {"entries": 0, "samples": 0, "sizes": {}, "sources": [], "rejected": {}}
        for name in (ROWS, KEYS, REJECTED):
            self._files[name].truncate(state["sizes"].get(name, 0))
        for path in set(self.directory.glob("shard-*.tar")) - {self.directory / shard.name for shard in self.shards}:
            path.unlink()
        self.entries, self._written = state["entries"], state["samples"]
        self.sources.update({(source, what): count for source, what, count in state["sources"]})
        self.rejected.update(state["rejected"])
        self.unread.update(state.get("unread", {}))
        self.damaged = state.get("damaged", 0)
        if states:
            self._table = GrowingArray(KEPT_ROW, np.fromfile(self.directory / ROWS, dtype=KEPT_ROW))
            self.keys = read_text(self.directory / KEYS).splitlines()
        assert self._written == len(self.keys) == len(self._table), "the journal and its files disagree"

    def _append(self, name: str, data: bytes) -> None:
        """Append to a file and flush it to the disk."""
        file = self._files[name]
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _complete_lines(path: Path) -> list[dict]:
    """Parse the lines that end with a newline."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]

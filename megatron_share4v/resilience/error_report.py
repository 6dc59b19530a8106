"""Error reports of failing ranks, merged in order of cause, since one rank's error makes its peers fail with others.

Each failing rank writes log/errors/rank<N>.json, then merges all reports so far into log/errors.txt: first the ranks
that failed by themselves, in order of time, then those that lost a peer. Ranks without a report were killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_share4v.errors import RunDirectoryInUse, RunStopped, Share4VError
from megatron_share4v.files import read_text
from megatron_share4v.logging import get_logger

FOLDER, MERGED = "errors", "errors.txt"
PEER_LOST_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Read error [",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
"""Parts of the error messages that torch's backends raise when another rank is gone."""
MERGE_WAIT_S = 3.0
"""How long rank 0 waits for the reports of other ranks before it merges them."""


@dataclass(frozen=True)
class RankError:
    """The error that ended one rank; the fields are the keys of rank<N>.json."""

    rank: int
    host: str
    at: float
    """Seconds since 1970, by the clock of the rank's node."""
    place: str
    """Step and phase in which it occurred."""
    error: str
    traceback: str

    @property
    def peer_lost(self) -> bool:
        """Whether the rank failed only because another rank was gone."""
        return any(message in self.error for message in PEER_LOST_MESSAGES)

    @property
    def who(self) -> str:
        """Rank and host, for messages."""
        return f"rank {self.rank} on {self.host}"


class ErrorReport:
    """Writes the error report of one rank; `position` returns what the rank is doing."""

    def __init__(self, log: Path, *, rank: int, ranks: int, position: Callable[[], str]) -> None:
        """Remove the reports of an earlier start.

        Each rank removes its own, since another may fail before rank 0 comes here; rank 0 removes those of ranks that
        this job does not have.
        """
        self._log, self._folder, self._rank, self._ranks, self._position = log, log / FOLDER, rank, ranks, position
        self._written = False
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"rank{rank}.json").unlink(missing_ok=True)
        if rank == 0:
            (log / MERGED).unlink(missing_ok=True)
            current = {f"rank{number}.json" for number in range(ranks)}
            for path in self._folder.glob("rank*.json"):
                if path.name not in current:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def record_errors(self) -> Iterator[None]:
        """Write the error that leaves the block, once where blocks are nested.

        A run that was stopped in order, or whose directory is in use, writes none.
        """
        try:
            yield
        except (RunStopped, RunDirectoryInUse):
            raise
        except BaseException as error:
            if not self._written:
                self._written = True
                with _sigterm_ignored():
                    self._write(error)
            raise

    def _write(self, error: BaseException) -> None:
        """Write and merge the reports; a full disk must not replace the error that is being reported."""
        own = RankError(
            rank=self._rank,
            host=socket.gethostname(),
            at=time.time(),
            place=self._position(),
            error=str(error) if isinstance(error, Share4VError) else f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
        )
        try:
            _replace_file(self._folder / f"rank{self._rank}.json", json.dumps(asdict(own)))
            deadline = time.monotonic() + (MERGE_WAIT_S if self._rank == 0 else 0.0)
            while len(errors := read_rank_errors(self._folder)) < self._ranks and time.monotonic() < deadline:
                time.sleep(0.1)
            _replace_file(self._log / MERGED, format_report(errors, ranks=self._ranks))
        except OSError as problem:
            get_logger().warning("the error report of rank %d could not be written: %s", self._rank, problem)
            return
        # An error that is the same on all ranks is printed when the process ends.
        if self._rank == 0 and (len(errors) < self._ranks or len({other.error for other in errors}) > 1):
            text = summarize(errors, ranks=self._ranks)
            get_logger().error("%s\n(tracebacks of all ranks: %s)", text, self._log / MERGED)


@contextlib.contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Ignore SIGTERM for the length of the block: the launcher sends it to all ranks when it sees the first one fail.

    Has no effect outside the main thread, where Python does not allow it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_rank_errors(folder: Path) -> list[RankError]:
    """Read all reports of the folder, causes before lost peers, each in order of time."""
    errors = [RankError(**json.loads(read_text(path))) for path in folder.glob("rank*.json")]
    return sorted(errors, key=lambda error: (error.peer_lost, error.at))


def summarize(errors: Sequence[RankError], *, ranks: int) -> str:
    """Describe in a few lines which rank failed first, which followed, and which left no report."""
    first, *rest = errors
    role = "the first to notice" if first.peer_lost else "first to fail"
    lines = [f"{role}: {first.who}, {first.place}: {first.error}"]
    followers: dict[str, list[int]] = {}
    for error in rest:
        followers.setdefault("its peers were gone" if error.peer_lost else error.error, []).append(error.rank)
    lines += [f"then rank {', '.join(map(str, sorted(numbers)))}: {text}" for text, numbers in followers.items()]
    missing = sorted(set(range(ranks)) - {error.rank for error in errors})
    if missing:
        lines.append(
            f"no error report from rank {', '.join(map(str, missing))}: killed (kill -9, out of memory, a lost node), "
            "or still running"
        )
    return "\n".join(lines)


def format_report(errors: Sequence[RankError], *, ranks: int) -> str:
    """Return the text of errors.txt: the summary, then the traceback of each rank in the same order."""
    blocks = [summarize(errors, ranks=ranks)]
    for error in errors:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(error.at))
        blocks.append(f"{at} UTC, {error.who}, {error.place}\n{error.traceback}")
    return "\n\n".join(blocks)


def _replace_file(path: Path, text: str) -> None:
    """Write by rename from a file name of this process: several ranks may write the same path at once."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""What each failing rank says last, and all of it as one text: one rank's mistake makes the others fail too, and theirs are the tracebacks one sees.

Each rank writes log/errors/rank<N>.json, then everything that has been said so far to log/errors.txt: the ranks that failed by themselves first, in
the order of time, then those whose peers were gone. Ranks that wrote nothing were ended from outside.
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
from megatron_share4v.logging import get_logger

FOLDER, MERGED = "errors", "errors.txt"
CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Read error [",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
"""What torch's backends say when another rank is gone."""
PATIENCE_S = 3.0
"""Rank 0 waits so long for the words of others before it tells them."""


@dataclass(frozen=True)
class Word:
    """The last of one rank. at: seconds since 1970, by its node's clock; place: what it was doing."""

    rank: int
    host: str
    at: float
    place: str
    error: str
    traceback: str

    @property
    def is_consequence(self) -> bool:
        """Whether only another rank's end made it fail."""
        return any(sign in self.error for sign in CONSEQUENCES)

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"


class ErrorReport:
    """This rank's. `place` says what the rank is doing when it is asked."""

    def __init__(self, log: Path, *, rank: int, ranks: int, place: Callable[[], str]) -> None:
        self._log, self._folder, self._rank, self._ranks, self._place = log, log / FOLDER, rank, ranks, place
        self._said = False
        self._folder.mkdir(parents=True, exist_ok=True)
        # What an earlier start left behind: each rank removes its own, since another may have failed before the first is here.
        (self._folder / f"rank{rank}.json").unlink(missing_ok=True)
        if rank == 0:
            (log / MERGED).unlink(missing_ok=True)
            own = {f"rank{number}.json" for number in range(ranks)}
            for path in self._folder.glob("rank*.json"):
                if path.name not in own:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write down what leaves the block as an error; once, where blocks are nested. A run that was stopped in order, or must not begin, has none."""
        try:
            yield
        except (RunStopped, RunDirectoryInUse):
            raise
        except BaseException as error:
            if not self._said:
                self._said = True
                with _undisturbed():
                    self._say(error)
            raise

    def _say(self, error: BaseException) -> None:
        """A rank that fails must not fail anew, and say something else, because the disk is full."""
        text = str(error) if isinstance(error, Share4VError) else f"{type(error).__name__}: {error}"
        word = Word(
            self._rank,
            socket.gethostname(),
            time.time(),
            self._place(),
            text,
            "".join(traceback.format_exception(error)),
        )
        try:
            _write(self._folder / f"rank{self._rank}.json", json.dumps(asdict(word)))
            deadline = time.monotonic() + (PATIENCE_S if self._rank == 0 else 0.0)
            while len(words := read_words(self._folder)) < self._ranks and time.monotonic() < deadline:
                time.sleep(0.1)
            _write(self._log / MERGED, merged(words, ranks=self._ranks))
        except OSError as problem:
            get_logger().warning("the last words of rank %d could not be written: %s", self._rank, problem)
        else:
            # What all ranks say alike is told by whoever ends the process.
            if self._rank == 0 and (len(words) < self._ranks or len({word.error for word in words}) > 1):
                get_logger().error("%s\n(all of it: %s)", summary(words, ranks=self._ranks), self._log / MERGED)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The launcher ends all ranks when it sees the first one fail: not in the middle of a word. Only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_words(folder: Path) -> list[Word]:
    """Those that are there, causes first, each kind in the order of time."""
    words = [Word(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank*.json")]
    return sorted(words, key=lambda word: (word.is_consequence, word.at))


def summary(words: Sequence[Word], *, ranks: int) -> str:
    """The first failure, and who followed, in a few lines."""
    first, *rest = words
    lines = [
        f"{'first to fail' if not first.is_consequence else 'the first to notice'}: {first.who}, {first.place}: {first.error}"
    ]
    followed: dict[str, list[int]] = {}
    for word in rest:
        followed.setdefault("its peers were gone" if word.is_consequence else word.error, []).append(word.rank)
    lines += [f"then rank {', '.join(map(str, sorted(numbers)))}: {error}" for error, numbers in followed.items()]
    silent = sorted(set(range(ranks)) - {word.rank for word in words})
    if silent:
        lines.append(
            f"no last word from rank {', '.join(map(str, silent))}: ended from outside (kill -9, out of memory, a lost node), or still at work"
        )
    return "\n".join(lines)


def merged(words: Sequence[Word], *, ranks: int) -> str:
    """All of it: the summary, then each rank's traceback in the same order."""
    blocks = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(word.at))} UTC, {word.who}, {word.place}\n{word.traceback}"
        for word in words
    ]
    return "\n\n".join([summary(words, ranks=ranks), *blocks])


def _write(path: Path, text: str) -> None:
    """Whole or not at all; several ranks may write the same file."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""Our command-line tools, started in a tenth of a second: forked from the server of harness.py, which has imported everything, instead of by a new
Python, which imports for seconds. From its first line on a tool does the same: arguments, environment, output, exit code, signals.

Not for tests of the start itself (what is imported when, torchrun, PYTHONPATH): these start a Python of their own. tests/test_readme.py so starts
every tool.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

from harness import forkserver, meeting_point, world_environment

ROOT = Path(__file__).resolve().parents[1]
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_S = 20.0


class Tool:
    """A tool that runs, with Popen's words where they mean the same. command: a script by its path from the root of the checkout, and its arguments.

    ranks: several are started as torchrun does it; they share output and error stream, and when one has failed the others are ended: SIGTERM, later
    SIGKILL. returncode is then the failed one's. merged: what goes to standard error goes to standard output. environment: in addition to ours.
    """

    def __init__(
        self, *command: object, ranks: int = 1, environment: Mapping[str, str] = {}, merged: bool = False
    ) -> None:
        self.args = [str(part) for part in command]
        self.returncode: int | None = None
        self._failed, self._deadline = 0, float("inf")
        own = (
            {key: value for key, value in os.environ.items() if key not in OF_LAUNCHERS}
            | {"OMP_NUM_THREADS": "1"}
            | dict(environment)
        )
        self._store = meeting_point() if ranks > 1 else None
        self._said = [tempfile.NamedTemporaryFile(prefix=name) for name in ("stdout", "stderr")]
        streams = [self._said[0].name, self._said[0 if merged else 1].name]
        self.processes = []
        for rank in range(ranks):
            place = world_environment(rank, ranks, self._store.port) if self._store else {}
            self.processes.append(forkserver().Process(target=_be, args=(self.args, own | place, streams)))
            self.processes[-1].start()

    @property
    def pid(self) -> int:
        """Rank 0's."""
        return self.processes[0].pid

    @property
    def said(self) -> tuple[str, str]:
        """Output and error stream until now."""
        output, errors = (Path(file.name).read_text() for file in self._said)
        return output, errors

    def poll(self) -> int | None:
        """The exit code (negative: a signal's number) once all ranks have ended."""
        codes = [process.exitcode for process in self.processes]
        if not self._failed and any(codes):
            self._failed, self._deadline = next(filter(None, codes)), time.monotonic() + GRACE_S
            self.send_signal(signal.SIGTERM)
        if None not in codes:
            self.returncode = self._failed
        elif time.monotonic() > self._deadline:
            self.send_signal(signal.SIGKILL)
        return self.returncode

    def communicate(self, *, timeout: float = 240) -> tuple[str, str]:
        """Wait for its end; output and error stream. Raises TimeoutExpired when it takes longer than `timeout` seconds, and then it is killed."""
        end = time.monotonic() + timeout
        try:
            while self.poll() is None:
                if time.monotonic() > end:
                    raise TimeoutExpired(self.args, timeout, *self.said)
                running = [process.sentinel for process in self.processes if process.exitcode is None]
                multiprocessing.connection.wait(running, timeout=0.5)
        finally:
            self.send_signal(signal.SIGKILL)
            for process in self.processes:
                process.join()
        return self.said

    def send_signal(self, number: int) -> None:
        """To every rank that still runs."""
        for process in self.processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it has ended just now
                    os.kill(process.pid, number)


def run_tool(*command: object, timeout: float = 240, **options: object) -> CompletedProcess:
    """A tool from start to end. The parameters are Tool's."""
    tool = Tool(*command, **options)
    output, errors = tool.communicate(timeout=timeout)
    return CompletedProcess(tool.args, tool.returncode, output, errors)


def _be(command: list[str], environment: dict[str, str], streams: list[str]) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.argv = command
    sys.path.insert(0, str((ROOT / command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")

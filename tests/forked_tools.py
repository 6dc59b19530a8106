"""Start command-line tools in a tenth of a second: forked from the fork server of harness.py, with all imports done.

Arguments, environment, output, exit code and signals are those of a started process. Tests of the start itself (import
order, torchrun, PYTHONPATH) must start a new Python process, as tests/test_readme.py does for every tool.
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

from harness import create_store, forkserver, world_environment

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_S = 20.0


class Tool:
    """Running tool with the interface of subprocess.Popen.

    command: script, relative to the root of the checkout, and its arguments. ranks: number of processes, started as by
    torchrun with shared output and error streams; after one has failed the others are ended (SIGTERM, later SIGKILL)
    and returncode is that of the failed one. merged: write standard error to standard output. environment: added
    variables.
    """

    def __init__(
        self, *command: object, ranks: int = 1, environment: Mapping[str, str] = {}, merged: bool = False
    ) -> None:
        self.args = [str(part) for part in command]
        self.returncode: int | None = None
        self._failed, self._deadline = 0, float("inf")
        own = (
            {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
            | {"OMP_NUM_THREADS": "1"}
            | dict(environment)
        )
        self._store = create_store() if ranks > 1 else None
        self._outputs = [tempfile.NamedTemporaryFile(prefix=name) for name in ("stdout", "stderr")]
        streams = [self._outputs[0].name, self._outputs[0 if merged else 1].name]
        self.processes = []
        for rank in range(ranks):
            place = world_environment(rank, ranks, self._store.port) if self._store else {}
            self.processes.append(forkserver().Process(target=_run_script, args=(self.args, own | place, streams)))
            self.processes[-1].start()

    @property
    def pid(self) -> int:
        """Process id of rank 0."""
        return self.processes[0].pid

    @property
    def output(self) -> tuple[str, str]:
        """Standard output and standard error until now."""
        output, errors = (Path(file.name).read_text() for file in self._outputs)
        return output, errors

    def poll(self) -> int | None:
        """Return the exit code (negative: a signal number) once all ranks have ended, None before."""
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
        """Wait for the end and return standard output and standard error.

        Kills the tool and raises TimeoutExpired after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        try:
            while self.poll() is None:
                if time.monotonic() > end:
                    raise TimeoutExpired(self.args, timeout, *self.output)
                running = [process.sentinel for process in self.processes if process.exitcode is None]
                multiprocessing.connection.wait(running, timeout=0.5)
        finally:
            self.send_signal(signal.SIGKILL)
            for process in self.processes:
                process.join()
        return self.output

    def send_signal(self, number: int) -> None:
        """Send a signal to every running rank."""
        for process in self.processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)


def run_tool(*command: object, timeout: float = 240, **options: object) -> CompletedProcess:
    """Run a tool to its end. Other parameters as for Tool."""
    tool = Tool(*command, **options)
    output, errors = tool.communicate(timeout=timeout)
    return CompletedProcess(tool.args, tool.returncode, output, errors)


def _run_script(command: list[str], environment: dict[str, str], streams: list[str]) -> None:
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

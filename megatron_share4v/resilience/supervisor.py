"""Starting a run again until it is made: bounded, with the reason of each end written down, and without a step that ended it twice.

This process imports neither torch nor megatron-core: it shall live when they do not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_share4v.checkpoint.retention import list_checkpoints
from megatron_share4v.config.load import load_run
from megatron_share4v.errors import ConfigError, RunDirectoryInUse
from megatron_share4v.exit_codes import ExitCode
from megatron_share4v.logging import get_logger
from megatron_share4v.observability.records import split_lines
from megatron_share4v.parallel.process import kill_on_parent_exit, process_status
from megatron_share4v.resilience.exit_analysis import ExitAnalysis, examine
from megatron_share4v.resilience.heartbeat import FOLDER
from megatron_share4v.resilience.rank_state import RankState, read_states
from megatron_share4v.resilience.run_lock import check_unlocked
from megatron_share4v.resilience.skip_steps import add_skip_steps, read_skip_steps

FILE = "restarts.jsonl"
POLL_S, END_S, FOLLOW_S = 0.2, 60.0, 600.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """max_restarts: without a new checkpoint between them; pause_s: before each; leads: this one, of the supervisors on several nodes, writes files."""

    max_restarts: int = 3
    pause_s: float = 10.0
    leads: bool = True


def run_directory(command: Sequence[str]) -> Path:
    """Of the run that a command line with tools/train.py starts: from its YAML file and the overrides behind. Raises ConfigError when it names none."""
    for number, word in enumerate(command):
        if word.endswith((".yaml", ".yml")):
            return Path(
                load_run(
                    word, [other for other in command[number + 1 :] if "=" in other and not other.startswith("-")]
                ).run.directory
            )
    raise ConfigError(f"{' '.join(command)}: names no YAML file; give the run directory with --run")


class Supervisor:
    """One run and the command that starts it."""

    def __init__(self, command: Sequence[str], run: Path, policy: Policy) -> None:
        self._command, self._run, self._policy = list(command), run, policy
        self._asked: str | None = None

    def supervise(self) -> int:
        """Start, and start again; the exit code: 0, 75 when it was asked to end, else that of the last cause."""
        before: ExitAnalysis | None = None
        failures, newest = 0, self._newest()
        for attempt in range(1, 1_000_000):
            told = len(self._told())
            code = self._start()
            after = examine(self._run) if code else ExitAnalysis("all ranks came to their end", 0)
            if after.code == 0:
                after = (
                    ExitAnalysis(
                        f"the launcher ended with exit code {code}, though all ranks that have begun came to their end",
                        None,
                    )
                    if code
                    else after
                )
            progress, newest = self._newest() > newest, self._newest()
            failures = 1 if progress else failures + 1
            poisoned = before is not None and after.of_step and before.of_step and after.step == before.step > 0
            ends = not code or not after.goes_on or self._asked is not None or failures > self._policy.max_restarts
            if poisoned and not ends and self._policy.leads and after.step not in read_skip_steps(self._run):
                add_skip_steps(self._run, [after.step], reason=f"ended the run twice: {after.reason}"[:500])
                get_logger().warning(
                    "supervise: step %d has ended the run twice and is skipped from now on", after.step
                )
            self._record(after, attempt=attempt, code=code, newest=newest, again=not ends)
            if ends:
                return self._last_word(after, code=code, failures=failures)
            before = after
            get_logger().warning(
                "supervise: %s. Starting again in %.0f s (%d of %d)",
                after.reason,
                self._policy.pause_s,
                failures,
                self._policy.max_restarts,
            )
            leader = None if self._policy.leads else self._leader(told)
            if leader is not None and not leader["again"]:
                get_logger().info("supervise: the first node's supervisor does not start again: %s", leader["reason"])
                return leader["code"] or 1
            time.sleep(self._policy.pause_s)
        raise AssertionError("unreachable")

    def _last_word(self, after: ExitAnalysis, *, code: int, failures: int) -> int:
        if not code:
            return 0
        if self._asked is not None and after.goes_on:
            get_logger().warning(
                "supervise: was asked to end by %s, and the run did not end in order: %s", self._asked, after.reason
            )
        elif after.goes_on:
            get_logger().error(
                "supervise: giving up after %d starts without a new checkpoint: %s", failures, after.reason
            )
        elif after.code == ExitCode.STOPPED:
            get_logger().info("supervise: %s", after.reason)
        else:
            get_logger().error("supervise: starting again would not help: %s", after.reason)
        return after.code or 1

    def _start(self) -> int:
        """One start, to its end; the launcher's exit code. Nothing of it lives when this returns. Raises RunDirectoryInUse when another job has the run directory."""
        if self._policy.leads:
            check_unlocked(self._run)
            shutil.rmtree(self._run / FOLDER, ignore_errors=True)
        handlers = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        told = False
        try:
            process = self._launch()
            while process.poll() is None:
                if self._asked is not None and not told:
                    told = self._tell(process)
                time.sleep(POLL_S)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._bury()
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _launch(self) -> subprocess.Popen:
        try:
            return subprocess.Popen(self._command, preexec_fn=kill_on_parent_exit, start_new_session=True)
        except OSError as error:
            raise ConfigError(
                f"{self._command[0]}: cannot be started: {error.strerror}; see what stands after --"
            ) from error

    def _ask(self, number: int, frame: object) -> None:
        self._asked = signal.Signals(number).name

    def _tell(self, process: subprocess.Popen) -> bool:
        """The ranks of this host are told, not the launcher, which would give them half a minute. Before any has begun, the launcher is."""
        living = list(self._living())
        for state in living:
            os.kill(state.pid, signal.SIGUSR1)
        if not living:
            process.terminate()
        return True

    def _living(self) -> Iterator[RankState]:
        for state in read_states(self._run / FOLDER):
            status = process_status(state.pid) if state.host == socket.gethostname() else None
            if status is not None and status[1] == state.born and status[0] != "Z":
                yield state

    def _bury(self) -> None:
        """Ranks that outlive their launcher would write beside those of the next start."""
        deadline = time.monotonic() + END_S
        while (living := list(self._living())) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        try:
            check_unlocked(self._run)
        except RunDirectoryInUse:
            # By now that is another job, and so are the ranks that can be seen here. On the other nodes it may be the first one's rank 0, still ending.
            if self._policy.leads:
                raise
            return
        for state in living:
            os.kill(state.pid, signal.SIGKILL)

    def _leader(self, told: int) -> dict[str, Any] | None:
        """What the first node's supervisor said of this start's end; `told` is what it had said before. None when it says nothing for too long.

        It speaks when its launcher has ended. A node that began before that would join the start that is ending, and wait there for a long time.
        """
        deadline = time.monotonic() + FOLLOW_S
        while len(records := self._told()) <= told:
            if time.monotonic() > deadline:
                get_logger().warning(
                    "supervise: the first node's supervisor has said nothing in %s for %.0f s; starting without it",
                    self._run / FILE,
                    FOLLOW_S,
                )
                return None
            time.sleep(POLL_S)
        return json.loads(records[-1])

    def _told(self) -> list[str]:
        """Whole lines of the record of ends, which the first node's supervisor writes."""
        return [line for line in split_lines(self._run / FILE) if line.endswith("\n")]

    def _newest(self) -> int:
        return max(list_checkpoints(self._run / "checkpoints"), default=0)

    def _record(self, after: ExitAnalysis, *, attempt: int, code: int, newest: int, again: bool) -> None:
        if not self._policy.leads:
            return
        record = {
            "time": time.time(),
            "attempt": attempt,
            "launcher_code": code,
            "newest_checkpoint": newest,
            "again": again,
            **asdict(after),
        }
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            with open(self._run / FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as problem:  # the disk may be what ended the run
            get_logger().warning(
                "supervise: %s of %s cannot be written: %s; it was to say: %s", FILE, self._run, problem, after.reason
            )

"""Restarts of a run until it completes: bounded, each end recorded, and without a step that ended the run twice.

This process imports neither torch nor megatron-core, so that it survives their failures.
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
from megatron_share4v.files import append_json_lines
from megatron_share4v.logging import get_logger
from megatron_share4v.observability.records import split_lines
from megatron_share4v.parallel.process import kill_on_parent_exit, process_status
from megatron_share4v.resilience.exit_analysis import COMPLETED, ExitAnalysis, analyze_exit
from megatron_share4v.resilience.heartbeat import FOLDER
from megatron_share4v.resilience.rank_state import RankState, read_states
from megatron_share4v.resilience.run_lock import check_unlocked
from megatron_share4v.resilience.skip_steps import add_skip_steps, read_skip_steps

FILE = "restarts.jsonl"
POLL_S, SURVIVOR_WAIT_S, FOLLOW_S = 0.2, 60.0, 600.0


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """When and how a run is restarted."""

    max_restarts: int = 3
    """Restarts in a row without a new checkpoint."""
    pause_s: float = 10.0
    """Pause before each restart."""
    leads: bool = True
    """Whether this supervisor, of those on several nodes, writes files."""


@dataclass(frozen=True)
class Attempt:
    """One start of the run and how it ended."""

    number: int
    launcher_code: int
    analysis: ExitAnalysis
    newest_checkpoint: int
    failures: int
    """Starts in a row, this one included, without a new checkpoint."""


def run_directory(command: Sequence[str]) -> Path:
    """Return the run directory of a tools/train.py command line, from its YAML file and the overrides behind it.

    Raises ConfigError when the command names no YAML file.
    """
    for number, word in enumerate(command):
        if word.endswith((".yaml", ".yml")):
            rest = command[number + 1 :]
            overrides = [other for other in rest if "=" in other and not other.startswith("-")]
            return Path(load_run(word, overrides).run.directory)
    raise ConfigError(f"{' '.join(command)}: names no YAML file; give the run directory with --run")


class Supervisor:
    """Starts one run with its command, and restarts it by the policy."""

    def __init__(self, command: Sequence[str], run: Path, policy: RestartPolicy) -> None:
        self._command, self._run, self._policy = list(command), run, policy
        self._stop_signal: str | None = None

    def supervise(self) -> int:
        """Start and restart the run; return 0, 75 when it was stopped, else the exit code of the last cause."""
        previous: ExitAnalysis | None = None
        failures, newest = 0, self._newest_checkpoint()
        for number in range(1, 1_000_000):
            known_records = len(self._records())
            code = self._run_once()
            progress, newest = self._newest_checkpoint() > newest, self._newest_checkpoint()
            failures = 1 if progress else failures + 1
            attempt = Attempt(number, code, self._analyze(code), newest, failures)
            last = self._is_last(attempt)
            if not last:
                self._skip_repeated_step(previous, attempt.analysis)
            self._record(attempt, again=not last)
            if last:
                return self._finish(attempt)
            previous = attempt.analysis
            get_logger().warning(
                "supervise: %s. Starting again in %.0f s (%d of %d)",
                previous.reason,
                self._policy.pause_s,
                failures,
                self._policy.max_restarts,
            )
            leader = None if self._policy.leads else self._wait_for_leader(known_records)
            if leader is not None and not leader["again"]:
                get_logger().info("supervise: the first node's supervisor does not start again: %s", leader["reason"])
                return leader["code"] or ExitCode.FAILURE
            time.sleep(self._policy.pause_s)
        raise AssertionError("unreachable")

    def _analyze(self, code: int) -> ExitAnalysis:
        if not code:
            return COMPLETED
        analysis = analyze_exit(self._run)
        if analysis.code == ExitCode.OK:
            return ExitAnalysis(f"the launcher ended with exit code {code}, though all ranks completed", None)
        return analysis

    def _is_last(self, attempt: Attempt) -> bool:
        stopped = self._stop_signal is not None or attempt.failures > self._policy.max_restarts
        return not attempt.launcher_code or not attempt.analysis.restart_can_help or stopped

    def _skip_repeated_step(self, previous: ExitAnalysis | None, current: ExitAnalysis) -> None:
        """Add a step that ended two starts in a row to the list of steps to skip."""
        if previous is None or not (current.of_step and previous.of_step and current.step == previous.step > 0):
            return
        if self._policy.leads and current.step not in read_skip_steps(self._run):
            add_skip_steps(self._run, [current.step], reason=f"ended the run twice: {current.reason}"[:500])
            get_logger().warning("supervise: step %d has ended the run twice and is skipped from now on", current.step)

    def _finish(self, attempt: Attempt) -> int:
        """Log why the run is not started again, and return the exit code of the supervisor."""
        analysis = attempt.analysis
        if not attempt.launcher_code:
            return ExitCode.OK
        if self._stop_signal is not None and analysis.restart_can_help:
            get_logger().warning(
                "supervise: received %s, and the run did not end in order: %s", self._stop_signal, analysis.reason
            )
        elif analysis.restart_can_help:
            get_logger().error(
                "supervise: giving up after %d starts without a new checkpoint: %s", attempt.failures, analysis.reason
            )
        elif analysis.code == ExitCode.STOPPED:
            get_logger().info("supervise: %s", analysis.reason)
        else:
            get_logger().error("supervise: starting again would not help: %s", analysis.reason)
        return analysis.code or ExitCode.FAILURE

    def _run_once(self) -> int:
        """Start the run, wait for its end and return the launcher's exit code; no rank of this host survives.

        Raises RunDirectoryInUse when another job has the run directory.
        """
        if self._policy.leads:
            check_unlocked(self._run)
            shutil.rmtree(self._run / FOLDER, ignore_errors=True)
        handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        handlers = {number: signal.signal(number, self._on_signal) for number in handled}
        forwarded = False
        try:
            process = self._launch()
            while process.poll() is None:
                if self._stop_signal is not None and not forwarded:
                    self._forward_stop(process)
                    forwarded = True
                time.sleep(POLL_S)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._kill_survivors()
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _launch(self) -> subprocess.Popen:
        try:
            return subprocess.Popen(self._command, preexec_fn=kill_on_parent_exit, start_new_session=True)
        except OSError as error:
            raise ConfigError(
                f"{self._command[0]}: cannot be started: {error.strerror}; check the command after --"
            ) from error

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop_signal = signal.Signals(number).name

    def _forward_stop(self, process: subprocess.Popen) -> None:
        """Send SIGUSR1 to the ranks of this host; to the launcher (SIGTERM) only before any rank has started.

        The launcher would kill the ranks after half a minute, which may be shorter than a save.
        """
        living = list(self._living_ranks())
        for state in living:
            os.kill(state.pid, signal.SIGUSR1)
        if not living:
            process.terminate()

    def _living_ranks(self) -> Iterator[RankState]:
        """Iterate over the ranks of this host whose process runs."""
        for state in read_states(self._run / FOLDER):
            status = process_status(state.pid) if state.host == socket.gethostname() else None
            if status is not None and status[1] == state.born and status[0] != "Z":
                yield state

    def _kill_survivors(self) -> None:
        """Kill ranks that outlive their launcher: they would write beside those of the next start."""
        deadline = time.monotonic() + SURVIVOR_WAIT_S
        while (living := list(self._living_ranks())) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        try:
            check_unlocked(self._run)
        except RunDirectoryInUse:
            # On the first node this is another job, with ranks of its own on this host. On other nodes the lock may
            # still be held by rank 0 of the job that is ending.
            if self._policy.leads:
                raise
            return
        for state in living:
            os.kill(state.pid, signal.SIGKILL)

    def _wait_for_leader(self, known_records: int) -> dict[str, Any] | None:
        """Wait for the record of this start by the first node's supervisor; None when it writes none in FOLLOW_S.

        It is written when the launcher of the first node has ended: a node that started before that would join the
        start that is ending, and wait there for a long time.
        """
        deadline = time.monotonic() + FOLLOW_S
        while len(records := self._records()) <= known_records:
            if time.monotonic() > deadline:
                get_logger().warning(
                    "supervise: no record of the first node's supervisor in %s for %.0f s; starting without it",
                    self._run / FILE,
                    FOLLOW_S,
                )
                return None
            time.sleep(POLL_S)
        return json.loads(records[-1])

    def _records(self) -> list[str]:
        """Read the complete lines of restarts.jsonl, which the first node's supervisor writes."""
        return [line for line in split_lines(self._run / FILE) if line.endswith("\n")]

    def _newest_checkpoint(self) -> int:
        return max(list_checkpoints(self._run / "checkpoints"), default=0)

    def _record(self, attempt: Attempt, *, again: bool) -> None:
        """Append the attempt to restarts.jsonl, on the first node only."""
        if not self._policy.leads:
            return
        record = {
            "time": time.time(),
            "attempt": attempt.number,
            "launcher_code": attempt.launcher_code,
            "newest_checkpoint": attempt.newest_checkpoint,
            "again": again,
            **asdict(attempt.analysis),
        }
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            with open(self._run / FILE, "ab") as file:
                append_json_lines(file, [record])
        except OSError as problem:  # a full disk may be what ended the run
            message = "supervise: %s of %s cannot be written: %s; the run ended because: %s"
            get_logger().warning(message, FILE, self._run, problem, attempt.analysis.reason)

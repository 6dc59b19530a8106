"""Heartbeat of each rank: step, phase, micro-batch, pending collective and last events, to explain a hang.

A thread writes the state to the run directory every few seconds (rank_state.py), also while the main thread waits in a
collective. When a step exceeds its bound on any rank, all ranks write their stacks, the first living rank reports which
rank differs (hang_diagnosis.py), and all end with exit code 76. The states are files, not a torch store, since any
process that hosts a store can be the one that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import Share4VError
from megatron_share4v.exit_codes import ExitCode
from megatron_share4v.files import read_text
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.process import process_status
from megatron_share4v.resilience import hang_diagnosis
from megatron_share4v.resilience.rank_state import MappedPosition, RankState, locate_frame, read_state, write_state

FOLDER, MARK = "watch", "hung"
EVENTS, STEPS = 20, 32
SILENT_BEATS = 4
"""A rank is silent when its heartbeat does not advance for this many beats."""
REPORTERS = 8
"""Number of ranks that can write the report; when all of them are silent, the job ends without one."""
LONGEST_BEAT_S = 5.0
SHORTEST_STEP_S = 120.0
"""Lowest step timeout, unless the configuration gives one in seconds."""


@dataclass(frozen=True, kw_only=True)
class PhaseTimeouts:
    """When a step or a collective takes too long, in seconds."""

    step_s: float | None = None
    """Longest step; None: by `factor`."""
    factor: float | None = None
    """Longest step as a multiple of the median of the last steps, at least `floor_s`; None: no bound."""
    floor_s: float = SHORTEST_STEP_S
    wait_s: float | None = None
    """Longest wait in one collective, within a step or not; below torch's timeout, whose message names no late rank."""

    @classmethod
    def from_config(cls, config: RunConfig) -> PhaseTimeouts:
        """Build the timeouts of a run."""
        watch, floor_s = config.watch, max(SHORTEST_STEP_S, 1.5 * config.loader_patience_s)
        return cls(step_s=watch.step_s, factor=watch.factor, floor_s=floor_s, wait_s=0.8 * config.parallel.timeout_s)

    @property
    def beat_s(self) -> float:
        """Interval of the heartbeat; a diagnosis takes some beats, for which `wait_s` leaves time."""
        return min(LONGEST_BEAT_S, (self.step_s or math.inf) / 12, (self.wait_s or math.inf) / 48)


class Heartbeat:
    """Tracks the position of this rank; within `running`, a thread publishes it and checks the timeouts."""

    def __init__(self, directory: Path, *, rank: int, ranks: int, timeouts: PhaseTimeouts = PhaseTimeouts()) -> None:
        self._folder, self._rank, self._ranks, self._timeouts = directory / FOLDER, rank, ranks, timeouts
        # phase, step, micro-batch, start: replaced as a whole, since the thread reads it at any time.
        self._position = ("start", 0, -1, time.monotonic())
        self._mapped: MappedPosition | None = None
        self._step_start: float | None = None
        self._durations: deque[float] = deque(maxlen=STEPS)
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._main_thread, self._beat, self._stop = threading.get_ident(), 0, threading.Event()
        self._ended: tuple[str | None, int | None] = (None, None)
        self._write_failed = False

    @staticmethod
    def clear(directory: Path) -> None:
        """Remove the files of an earlier start. Call on one rank, before any rank enters `running`."""
        shutil.rmtree(directory / FOLDER, ignore_errors=True)
        (directory / FOLDER).mkdir(parents=True)

    @property
    def position(self) -> str:
        """Step, phase and micro-batch of this rank, for messages."""
        phase, step, micro_batch, _ = self._position
        return f"step {step}, {phase}" + (f", micro-batch {micro_batch}" if micro_batch >= 0 else "")

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Enter a phase on the main thread; `step` (1-based) ends the previous step and starts that one."""
        now = time.monotonic()
        if step is not None:
            if self._step_start is not None:
                self._durations.append(now - self._step_start)
            self._step_start = now
        self._set_position(phase, self._position[1] if step is None else step, -1, now)
        self._events.append(f"{time.strftime('%H:%M:%S')} step {self._position[1]} {phase}")

    def pause(self, phase: str) -> None:
        """Enter a phase outside any step (save, validation), bounded by the timeout of its collectives only."""
        if self._step_start is not None:
            self._durations.append(time.monotonic() - self._step_start)
        self._step_start = None
        self.enter(phase)

    def begin_micro_batch(self, number: int) -> None:
        """Record that the forward pass of micro-batch `number` begins."""
        phase, step, _, _ = self._position
        self._set_position(phase, step, number, time.monotonic())

    def _set_position(self, phase: str, step: int, micro_batch: int, now: float) -> None:
        self._position = (phase, step, micro_batch, now)
        if self._mapped is not None:
            self._mapped.set(step=step, phase=phase, micro_batch=micro_batch)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Publish the state and check the timeouts for the length of the block, then publish how it ended."""
        self._mapped = MappedPosition(self._folder, self._rank)
        with open(self._folder / f"rank{self._rank}.stacks.txt", "w", encoding="utf-8") as stacks:
            thread = threading.Thread(target=self._run, args=(stacks,), name="watch", daemon=True)
            thread.start()
            try:
                yield
                self._ended = ("", ExitCode.OK)
            except BaseException as error:
                code = error.exit_code if isinstance(error, Share4VError) else ExitCode.FAILURE
                self._ended = (f"{type(error).__name__}: {error}", code)
                raise
            finally:
                self._stop.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()
                self._publish()

    def _run(self, stacks: TextIO) -> None:
        while True:
            self._publish()
            # A timer in C, which writes the stacks even when a call into C never releases the interpreter lock.
            timer_s = max(30.0, 6 * self._timeouts.beat_s, self._step_timeout() or 0.0)
            faulthandler.dump_traceback_later(timer_s, file=stacks)
            if self._stop.wait(self._timeouts.beat_s):
                return
            reason = self._timeout_reason()
            if reason or (self._folder / MARK).exists():
                self._end_hung(stacks, reason)

    def _publish(self) -> None:
        self._beat += 1
        try:
            write_state(self._folder, self._state())
        except OSError as problem:
            # A full disk must not end this thread, nor replace the error that ended the run.
            if not self._write_failed:
                get_logger().warning("the state of rank %d cannot be written: %s", self._rank, problem)
            self._write_failed = True
        else:
            self._write_failed = False

    def _state(self) -> RankState:
        phase, step, micro_batch, since = self._position
        where, collective = self._stack()
        status = process_status(os.getpid())
        return RankState(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            born=status[1] if status else 0,
            beat=self._beat,
            step=step,
            phase=phase,
            micro_batch=micro_batch,
            since_s=round(time.monotonic() - since, 3),
            where=where,
            collective=collective,
            ended=self._ended[0],
            code=self._ended[1],
            events=list(self._events),
        )

    def _stack(self) -> tuple[str, str]:
        return locate_frame(sys._current_frames().get(self._main_thread))

    def _step_timeout(self) -> float | None:
        if self._timeouts.step_s is not None or self._timeouts.factor is None:
            return self._timeouts.step_s
        # The first step is left out: it compiles, allocates and fills caches.
        usual = list(self._durations)[1:]
        return max(self._timeouts.floor_s, self._timeouts.factor * statistics.median(usual)) if usual else None

    def _timeout_reason(self) -> str:
        now, began, bound = time.monotonic(), self._step_start, self._step_timeout()
        if began is not None and bound is not None and now - began > bound:
            step, taken_s = self._position[1], now - began
            return f"step {step} has taken {taken_s:.1f} s on rank {self._rank}, the bound is {bound:.1f} s"
        waited, wait_s = now - self._position[3], self._timeouts.wait_s
        if wait_s is not None and waited > wait_s and self._stack()[1]:
            return f"rank {self._rank} has waited {waited:.1f} s in {self._stack()[1]}, the bound is {wait_s:.1f} s"
        return ""

    def _end_hung(self, stacks: TextIO, reason: str) -> None:
        """Write the stacks, write the report unless a lower rank is alive to do so, and end the process."""
        mark = self._folder / MARK
        if not mark.exists():
            mark.write_text(reason, encoding="utf-8")
        faulthandler.dump_traceback(file=stacks)
        stacks.flush()
        before = [read_state(self._folder, rank) for rank in range(min(self._rank, REPORTERS))]
        self._publish_for(SILENT_BEATS)
        if self._rank < REPORTERS and not any(
            hang_diagnosis.has_advanced(state, read_state(self._folder, rank)) for rank, state in enumerate(before)
        ):
            wait_s = SILENT_BEATS * self._timeouts.beat_s
            observed = hang_diagnosis.observe_ranks(self._folder, ranks=self._ranks, wait_s=wait_s)
            observed = [self._mark_alive(one) for one in observed]
            reason = read_text(mark)
            hang_diagnosis.write_report(self._folder, ranks=self._ranks, reason=reason, observed=observed)
        else:
            self._publish_for(6 * SILENT_BEATS, until=(self._folder / hang_diagnosis.REPORT).exists)
        report = self._folder / hang_diagnosis.REPORT
        if report.exists():
            silent = json.loads(read_text(report))["silent"]
            hang_diagnosis.kill_silent_ranks(self._folder, silent)
        sys.stderr.flush()
        os._exit(ExitCode.HUNG)

    def _mark_alive(self, one: hang_diagnosis.ObservedRank) -> hang_diagnosis.ObservedRank:
        """Mark this rank as alive: it publishes nothing while it observes the others."""
        return hang_diagnosis.ObservedRank(one.rank, one.state, True, "R") if one.rank == self._rank else one

    def _publish_for(self, beats: int, *, until: Callable[[], bool] = lambda: False) -> None:
        """Publish the state for this many beats, or until the condition holds."""
        for _ in range(beats):
            if until():
                return
            time.sleep(self._timeouts.beat_s)
            self._publish()

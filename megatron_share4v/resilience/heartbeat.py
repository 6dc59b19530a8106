"""Each rank says where it is, so that a hang can be explained: step, phase, micro-batch, the collective it waits in, its last events.

A thread writes this to the run directory every few seconds (rank_state.py); it goes on when the main thread waits in a collective for ever. When a step
takes longer than its bound on any rank, all write their stacks, the first living one reports which rank differs (hang_diagnosis.py), and all end with exit code 76.
Files, not a store of torch's: whichever process hosted one could be the one that hangs.
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
from typing import Any, TextIO

from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import Share4VError
from megatron_share4v.exit_codes import ExitCode
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.process import process_status
from megatron_share4v.resilience import hang_diagnosis
from megatron_share4v.resilience.rank_state import Place, RankState, locate, read_state, write_state

FOLDER, MARK = "watch", "hung"
EVENTS, STEPS = 20, 32
SILENT_BEATS = 4
"""So many beats without a new one: the rank is silent."""
REPORTERS = 8
"""If the first ranks are all silent, so many of them, the job ends without a report."""
LONGEST_BEAT_S = 5.0
SHORTEST_STEP_S = 120.0
"""No step is too long that takes less, unless the configuration gives a bound in seconds."""


@dataclass(frozen=True, kw_only=True)
class PhaseTimeouts:
    """When a step takes too long, in seconds: `step_s`, or `factor` times the median of the last steps and at least `floor_s`; both None: never.

    wait_s: longest time in one collective, in a step or not; a little less than torch's own time-out, which does not say who is late.
    """

    step_s: float | None = None
    factor: float | None = None
    floor_s: float = SHORTEST_STEP_S
    wait_s: float | None = None

    @classmethod
    def from_config(cls, config: RunConfig) -> PhaseTimeouts:
        """Those of a run."""
        watch, floor_s = config.watch, max(SHORTEST_STEP_S, 1.5 * config.loader_patience_s)
        return cls(step_s=watch.step_s, factor=watch.factor, floor_s=floor_s, wait_s=0.8 * config.parallel.timeout_s)

    @property
    def beat_s(self) -> float:
        """How often ranks say where they are. Explaining a hang takes some beats, for which `wait_s` leaves time."""
        return min(LONGEST_BEAT_S, (self.step_s or math.inf) / 12, (self.wait_s or math.inf) / 48)


class Heartbeat:
    """This rank's. Outside `running` it only remembers."""

    def __init__(self, directory: Path, *, rank: int, ranks: int, bounds: PhaseTimeouts = PhaseTimeouts()) -> None:
        self._folder, self._rank, self._ranks, self._bounds = directory / FOLDER, rank, ranks, bounds
        # phase, step, micro-batch, since when: replaced as a whole, for the thread reads it at any time.
        self._place = ("start", 0, -1, time.monotonic())
        self._kept: Place | None = None
        self._step_began: float | None = None
        self._durations: deque[float] = deque(maxlen=STEPS)
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._main, self._beat, self._over = threading.get_ident(), 0, threading.Event()
        self._ended: tuple[str | None, int | None] = (None, None)
        self._unwritten = False

    @staticmethod
    def clear(directory: Path) -> None:
        """Forget what an earlier start left behind. One rank does it, before any other watches."""
        shutil.rmtree(directory / FOLDER, ignore_errors=True)
        (directory / FOLDER).mkdir(parents=True)

    @property
    def position(self) -> str:
        """Where this rank is, for messages."""
        phase, step, micro_batch, _ = self._place
        return f"step {step}, {phase}" + (f", micro-batch {micro_batch}" if micro_batch >= 0 else "")

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """The main thread begins something else. With `step`, that step begins, and the one before has ended."""
        now = time.monotonic()
        if step is not None:
            if self._step_began is not None:
                self._durations.append(now - self._step_began)
            self._step_began = now
        self._go_to(phase, self._place[1] if step is None else step, -1, now)
        self._events.append(f"{time.strftime('%H:%M:%S')} step {self._place[1]} {phase}")

    def pause(self, phase: str) -> None:
        """The main thread begins something that belongs to no step and has no bound but that of its collectives: a save, a validation."""
        if self._step_began is not None:
            self._durations.append(time.monotonic() - self._step_began)
        self._step_began = None
        self.enter(phase)

    def counting(self, batches: list[Any]) -> list[Any]:
        """The same micro-batches; taking one out says that it begins."""
        return _Counted(batches, self._begin_micro_batch)

    def _begin_micro_batch(self, number: int) -> None:
        phase, step, _, _ = self._place
        self._go_to(phase, step, number, time.monotonic())

    def _go_to(self, phase: str, step: int, micro_batch: int, now: float) -> None:
        self._place = (phase, step, micro_batch, now)
        if self._kept is not None:
            self._kept.set(step=step, phase=phase, micro_batch=micro_batch)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Publish and watch for the length of the block, and say at its end how it ended."""
        self._kept = Place(self._folder, self._rank)
        with open(self._folder / f"rank{self._rank}.stacks.txt", "w", encoding="utf-8") as stacks:
            thread = threading.Thread(target=self._run, args=(stacks,), name="watch", daemon=True)
            thread.start()
            try:
                yield
                self._ended = ("", 0)
            except BaseException as error:
                self._ended = (
                    f"{type(error).__name__}: {error}",
                    error.exit_code if isinstance(error, Share4VError) else 1,
                )
                raise
            finally:
                self._over.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()
                self._publish()

    def _run(self, stacks: TextIO) -> None:
        while True:
            self._publish()
            # Should something in C hold the interpreter's lock for ever, a timer in C writes the stacks at least.
            faulthandler.dump_traceback_later(
                max(30.0, 6 * self._bounds.beat_s, self._step_bound() or 0.0), file=stacks
            )
            if self._over.wait(self._bounds.beat_s):
                return
            reason = self._overdue()
            if reason or (self._folder / MARK).exists():
                self._end_hung(stacks, reason)

    def _publish(self) -> None:
        self._beat += 1
        try:
            write_state(self._folder, self._state())
        except OSError as problem:
            # A full disk must not end the thread that watches, nor hide what ended the run.
            if not self._unwritten:
                get_logger().warning("where rank %d is cannot be written: %s", self._rank, problem)
            self._unwritten = True
        else:
            self._unwritten = False

    def _state(self) -> RankState:
        phase, step, micro_batch, since = self._place
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
        return locate(sys._current_frames().get(self._main))

    def _step_bound(self) -> float | None:
        if self._bounds.step_s is not None or self._bounds.factor is None:
            return self._bounds.step_s
        # The first step compiles, allocates and fills caches.
        usual = list(self._durations)[1:]
        return max(self._bounds.floor_s, self._bounds.factor * statistics.median(usual)) if usual else None

    def _overdue(self) -> str:
        now, began, bound, wait_s = time.monotonic(), self._step_began, self._step_bound(), self._bounds.wait_s
        if began is not None and bound is not None and now - began > bound:
            return (
                f"step {self._place[1]} has taken {now - began:.1f} s on rank {self._rank}, the bound is {bound:.1f} s"
            )
        waited = now - self._place[3]
        if wait_s is not None and waited > wait_s and self._stack()[1]:
            return f"rank {self._rank} has waited {waited:.1f} s in {self._stack()[1]}, the bound is {wait_s:.1f} s"
        return ""

    def _end_hung(self, stacks: TextIO, reason: str) -> None:
        """Write what this rank knows, report if no rank before it can, and end the process."""
        mark = self._folder / MARK
        if not mark.exists():
            mark.write_text(reason, encoding="utf-8")
        faulthandler.dump_traceback(file=stacks)
        stacks.flush()
        before = [read_state(self._folder, rank) for rank in range(min(self._rank, REPORTERS))]
        self._beat_for(SILENT_BEATS)
        if self._rank < REPORTERS and not any(
            hang_diagnosis.lives(state, read_state(self._folder, rank)) for rank, state in enumerate(before)
        ):
            # Its own file rests meanwhile, but it need not be told that it lives.
            seen = [
                self._myself(one)
                for one in hang_diagnosis.look(
                    self._folder, ranks=self._ranks, wait_s=SILENT_BEATS * self._bounds.beat_s
                )
            ]
            hang_diagnosis.report(self._folder, ranks=self._ranks, reason=mark.read_text(encoding="utf-8"), seen=seen)
        else:
            self._beat_for(6 * SILENT_BEATS, until=(self._folder / hang_diagnosis.REPORT).exists)
        if (self._folder / hang_diagnosis.REPORT).exists():
            hang_diagnosis.end_silent(
                self._folder, json.loads((self._folder / hang_diagnosis.REPORT).read_text(encoding="utf-8"))["silent"]
            )
        sys.stderr.flush()
        os._exit(ExitCode.HUNG)

    def _myself(self, one: hang_diagnosis.Seen) -> hang_diagnosis.Seen:
        return hang_diagnosis.Seen(one.rank, one.state, True, "R") if one.rank == self._rank else one

    def _beat_for(self, beats: int, *, until: Callable[[], bool] = lambda: False) -> None:
        """Show that this rank lives."""
        for _ in range(beats):
            if until():
                return
            time.sleep(self._bounds.beat_s)
            self._publish()


class _Counted(list):
    """Micro-batches that say when one is taken."""

    def __init__(self, batches: list[Any], begins: Callable[[int], None]) -> None:
        super().__init__(batches)
        self._begins = begins

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            self._begins(number)
            yield self[number]

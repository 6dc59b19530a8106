"""Control flags: conditions of one rank on which all ranks act at the same step, summed with the loss all-reduce.

SIGTERM (Slurm before preemption, torchrun when it is terminated) and SIGUSR1 (Slurm's --signal) stop the run after the
current step; the handler only counts them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_share4v.errors import RunStopped
from megatron_share4v.logging import get_logger
from megatron_share4v.resilience.time_limit import TimeLimit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class StepDecision:
    """What to do at the end of a step, equal on all ranks."""

    stop_reason: str | None
    """Why the run stops after this step; None when it continues."""
    save: bool
    """Whether a save is due by checkpoint.every_minutes."""
    save_failed: bool = False
    """Whether a save in the background has failed."""


class StopSignals:
    """Counters of the signals that stop a run. A signal must not interrupt a rank that is reporting another error."""

    def __init__(self) -> None:
        self.received = dict.fromkeys(SIGNALS, 0)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Count signals inside the block and restore the handlers after it; ignore signals after RunStopped.

        Python runs signal handlers on the main thread only; on another thread this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        after = {number: signal.signal(number, self._count) for number in SIGNALS}
        try:
            yield
        except RunStopped:
            # The launcher signals the other ranks when the first has ended; they must still exit normally.
            after = dict.fromkeys(SIGNALS, signal.SIG_IGN)
            raise
        finally:
            for number, handler in after.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: object) -> None:
        # Only count: this may interrupt any code, including a write to the log.
        self.received[signal.Signals(number)] += 1


class ControlFlags:
    """Control flags of this rank, and the decision derived from their sum over all ranks."""

    def __init__(self, signals: StopSignals, time_limit: TimeLimit | None, *, save_failed: Callable[[], bool]) -> None:
        """time_limit: None on all ranks but rank 0; save_failed: whether a background save failed on this rank."""
        self._signals, self._time_limit, self._save_failed = signals, time_limit, save_failed

    def read(self) -> Sequence[float]:
        """Return the flags of this rank: one for each signal, time limit reached, save due, save failed."""
        limit = self._time_limit
        conditions = [limit is not None and limit.is_up, limit is not None and limit.save_is_due, self._save_failed()]
        return [*(float(count > 0) for count in self._signals.received.values()), *map(float, conditions)]

    def decide(self, summed: Sequence[float]) -> StepDecision:
        """Derive the decision from the flags summed over all ranks."""
        *signals, time_up, save_due, save_failed = summed
        reasons = [f"{number.name} on {int(count)} ranks" for number, count in zip(SIGNALS, signals) if count]
        reasons += ["its time limit is near"] if time_up else []
        return StepDecision(", ".join(reasons) or None, save=bool(save_due), save_failed=bool(save_failed))


def log_stop(decision: StepDecision, *, step: int) -> None:
    """Log why a run is about to stop."""
    if decision.stop_reason is not None:
        get_logger().warning("stopping in order after step %d: %s", step, decision.stop_reason)

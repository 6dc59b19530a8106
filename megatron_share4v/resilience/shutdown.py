"""What one rank knows and all must act on at the same step: a signal has come, time is up, a save is due. Each votes; the step's own reduction counts.

SIGTERM (Slurm before preemption, torchrun when it is ended) and SIGUSR1 (Slurm's --signal) end the run in order. Only a flag is set when they come.
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
class Agreed:
    """Equal on all ranks. stop: why the run ends after this step, None when it goes on; save: a save is due because of the time; failed: a save in
    the background has failed."""

    stop: str | None
    save: bool
    failed: bool = False


class Signals:
    """Those that ask a run to end. They only count: what comes while a rank goes down for another reason must not keep it from saying why."""

    def __init__(self) -> None:
        self.received = dict.fromkeys(SIGNALS, 0)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Signals count for the length of the block; afterwards they do what they did before, or nothing where the run was stopped in order.

        Python hears them on the main thread alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        after = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        except RunStopped:
            # When the first rank has ended, the launcher sends the others a signal, which must not cut them off.
            after = dict.fromkeys(SIGNALS, signal.SIG_IGN)
            raise
        finally:
            for number, handler in after.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        # A flag and no more: this may interrupt anything, a write to the log too.
        self.received[signal.Signals(number)] += 1


class Ballot:
    """One rank's votes. `time` is the clock of the rank that keeps it, None on all others; `failed` says whether a save has failed here."""

    def __init__(self, signals: Signals, time: TimeLimit | None, *, failed: Callable[[], bool]) -> None:
        self._signals, self._time, self._failed = signals, time, failed

    def votes(self) -> Sequence[float]:
        """This rank's, one number for each question."""
        time = self._time
        asked = [time is not None and time.is_up, time is not None and time.save_is_due, self._failed()]
        return [*(float(count > 0) for count in self._signals.received.values()), *map(float, asked)]

    def count(self, votes: Sequence[float]) -> Agreed:
        """The decision from the votes of all ranks, added up."""
        *signals, time_up, save_due, failed = votes
        reasons = [f"{number.name} on {int(count)} ranks" for number, count in zip(SIGNALS, signals) if count]
        reasons += ["its time limit is near"] if time_up else []
        return Agreed(stop=", ".join(reasons) or None, save=bool(save_due), failed=bool(failed))


def announce(agreed: Agreed, *, step: int) -> None:
    """Say why a run is about to end."""
    if agreed.stop is not None:
        get_logger().warning("stopping in order after step %d: %s", step, agreed.stop)

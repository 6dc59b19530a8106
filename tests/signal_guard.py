"""A test run does not end without a word: a signal from outside is named in its summary, and no code under test can leave by os._exit. (SIGKILL can.)"""

from __future__ import annotations

import os
import signal
from types import FrameType

import pytest

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def pytest_configure(config: pytest.Config) -> None:
    """A hook of pytest's, before any test."""
    own, leave = os.getpid(), os._exit

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a fork, which ends as any program does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        pytest.exit(f"this test run was ended from outside, by {signal.Signals(number).name}", returncode=128 + number)

    def refuse(code: int) -> None:
        if os.getpid() == own:
            raise AssertionError(
                f"os._exit({code}) in the process of the tests: run what ends by it in a process of its own"
            )
        leave(code)

    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, end)
    os._exit = refuse

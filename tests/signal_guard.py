"""pytest plugin that reports why a test run ends early.

A signal from outside is named in the summary, and os._exit in the test process raises AssertionError. SIGKILL cannot be
caught.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

import pytest

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def pytest_configure(config: pytest.Config) -> None:
    """Install the signal handlers and replace os._exit before any test runs."""
    own, leave = os.getpid(), os._exit

    def exit_pytest(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a forked child: apply the default action
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        pytest.exit(f"this test run was ended from outside, by {signal.Signals(number).name}", returncode=128 + number)

    def refuse_exit(code: int) -> None:
        if os.getpid() == own:
            raise AssertionError(f"os._exit({code}) in the test process: run code that calls it in a subprocess")
        leave(code)

    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # keep signals that nohup ignores
            signal.signal(number, exit_pytest)
    os._exit = refuse_exit

"""What the operating system knows of processes: whether one lives, and that one ends with another. No torch here."""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path


def process_status(pid: int) -> tuple[str, int] | None:
    """(letter of its state, start time in ticks) of a process of this host; None where there is none."""
    path = Path(f"/proc/{pid}/stat")
    try:
        # The name in parentheses may contain anything.
        fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])


def kill_on_parent_exit() -> None:
    """The kernel kills this process when the one that started it ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

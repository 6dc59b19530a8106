"""Process facts of the operating system: state and start time of a process, and the parent-death signal. No torch."""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

from megatron_share4v.files import read_text


def process_status(pid: int) -> tuple[str, int] | None:
    """Read (state letter, start time in clock ticks) of a process of this host; None when there is no such process."""
    path = Path(f"/proc/{pid}/stat")
    try:
        # The command name in parentheses may contain anything.
        fields = read_text(path, errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])


def kill_on_parent_exit() -> None:
    """Have the kernel kill this process when its parent ends (PR_SET_PDEATHSIG; Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

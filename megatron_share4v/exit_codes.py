"""Exit codes of the commands; docs/operations.md explains what a supervisor or a batch script does about each."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command of this project ended."""

    OK = 0
    USER_ERROR = 2
    """Bad input or configuration; starting again would fail again."""
    STOPPED = 75
    """EX_TEMPFAIL of sysexits.h: ended in order before its last step, everything saved; the same command continues."""
    HUNG = 76
    """A rank exceeded its time bound; the report in `watch/` names it. Starting again may help."""
    DAMAGED = 77
    """A rank's numbers are wrong although its program is right, probably its hardware. Continue on another node."""

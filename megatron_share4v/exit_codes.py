"""Exit codes of all commands; docs/operations.md says what a supervisor or a batch script does about each."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command of this project ended."""

    OK = 0
    FAILURE = 1
    """An uncaught exception: a fault of this project or of the machine. A restart may help."""
    USER_ERROR = 2
    """Bad input or configuration; a restart would fail again."""
    PARTIAL = 3
    """Finished, but some of the inputs failed and are listed in the output."""
    STOPPED = 75
    """Ended in order before the last step, everything saved; the same command continues (EX_TEMPFAIL of sysexits.h)."""
    HUNG = 76
    """A rank exceeded its time bound; the report in `watch/` names it. A restart may help."""
    DAMAGED = 77
    """A rank computes wrong numbers with the right program, probably its hardware. Continue on another node."""
    OUTPUT_CLOSED = 141
    """Nothing reads the standard output any more (`tool | head`); what a shell reports for SIGPIPE."""

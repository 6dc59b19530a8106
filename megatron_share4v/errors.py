"""The errors that a user can cause; each message states what is wrong, the value, where it is, and what to do.

A command ends with the message alone (no traceback) and exit code 2, or the exit code of the class. Any other exception
is a fault of this project.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_share4v.exit_codes import ExitCode


class Share4VError(Exception):
    """Base of all user-facing errors, with the exit code of the command and the first word of its message."""

    exit_code = ExitCode.USER_ERROR
    word = "error"


class ConfigError(Share4VError):
    """The configuration, or the layout that it asks for, cannot be used."""


class RunDirectoryInUse(ConfigError):
    """Another job trains in the run directory; nothing was written there."""


class DataError(Share4VError):
    """Annotations, images, shards, index or tokenizer are missing, damaged or do not belong together."""


class CheckpointError(Share4VError):
    """A checkpoint is missing, damaged, or does not fit the model or the run."""


class ConversionError(Share4VError):
    """Weights of another layout cannot be mapped onto this model."""


class OpsError(Share4VError):
    """A requested op or backend is not available on this machine."""


class PrecisionError(Share4VError):
    """FP8 has moved further from full precision than a run allows."""


class ServeError(Share4VError):
    """A server cannot be started, or a remote server does not respond."""


class TrainingError(Share4VError):
    """Training has diverged, and a restart would not change that."""


class DamageError(Share4VError):
    """The numbers of a rank are wrong although its program is right; a restart on another node may help."""

    exit_code = ExitCode.DAMAGED


class RunStopped(Share4VError):
    """A run ended in order before its last step, on request: everything is saved and the same command continues it."""

    exit_code = ExitCode.STOPPED
    word = "stopped"


DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""A full, read-only or failing disk: a user error wherever it occurs."""
PATH_ERRNOS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT)
"""A path that cannot be used: a user error below the directory that the user named."""
PEER_DELAY_S = 3.0
"""How long ranks other than 0 wait before they print an error; the launcher has usually ended them by then."""


@contextlib.contextmanager
def disk_errors_as_config_error(directory: Path) -> Iterator[None]:
    """Turn the OSError of a full or failing disk, or of an unusable path below `directory`, into a ConfigError."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename or directory)  # the error of a flush names no file
        below = where.absolute().is_relative_to(directory.absolute())
        if error.errno not in DISK_ERRNOS and not (error.errno in PATH_ERRNOS and below):
            raise
        raise ConfigError(
            f"{where} cannot be read or written on {socket.gethostname()}: {error.strerror}; "
            "see to the disk or its permissions, then start again"
        ) from error


@contextlib.contextmanager
def exit_on_user_error(*, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """End the process with the message and the exit code of a Share4VError raised in the block.

    Most such errors occur on all ranks alike: rank 0 prints at once, the others after PEER_DELAY_S. A run that was
    stopped in order is reported by rank 0 alone.
    """
    try:
        yield
    except Share4VError as error:
        stopped = isinstance(error, RunStopped)
        if rank and not stopped:
            time.sleep(PEER_DELAY_S)
        where = f"rank {rank}: " if ranks > 1 else ""
        if not (rank and stopped):
            print(f"{error.word}: {where}{error}", file=sys.stderr, flush=True)
        # Peers may still be in a collective: leave without waiting for them.
        sys.stderr.flush()
        os._exit(error.exit_code)


@contextlib.contextmanager
def exit_on_closed_output() -> Iterator[None]:
    """End the process quietly when nothing reads its standard output any more (`tool | head`), with exit code 141.

    Broken pipes of sockets and of other processes are raised as ever.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        sys.stderr.flush()
        os._exit(ExitCode.OUTPUT_CLOSED)


def _output_is_closed() -> bool:
    """Return whether standard output is a pipe or socket whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError):  # no standard output, or none of the system's
        return False

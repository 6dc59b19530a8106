"""The errors that a user can cause. Each message says what is wrong, the value, where, and what to do.

A command ends with the message alone (no traceback) and exit code 2, or the class's own, for any of them; every other exception is our bug.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_share4v.exit_codes import ExitCode


class Share4VError(Exception):
    """Base of all user-facing errors; `exit_code` is what the command ends with, `word` what its message begins with."""

    exit_code = ExitCode.USER_ERROR
    word = "error"


class ConfigError(Share4VError):
    """The configuration, or the layout that it asks for, cannot be used."""


class RunDirectoryInUse(ConfigError):
    """Another job trains in the run directory. It says nothing there: that is the other's."""


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
    """A server that was asked for, or asked, does not answer."""


class TrainingError(Share4VError):
    """Training does not learn any more, and starting again would not change that."""


class DamageError(Share4VError):
    """A rank's numbers are wrong though its program is right. Starting again from a checkpoint may help, on another node."""

    exit_code = ExitCode.DAMAGED


class RunStopped(Share4VError):
    """A run ended in order before its last step, because it was asked to: all is saved, and the same command goes on."""

    exit_code = ExitCode.STOPPED
    word = "stopped"


DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
PATH_ERRNOS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT)


@contextlib.contextmanager
def disk_errors_as_config_error(directory: Path) -> Iterator[None]:
    """A disk that is full or lost, and a place below `directory` that is not ours to write, is the user's to mend: ConfigError, from the system's error."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename or directory)  # a flush does not say which file
        if error.errno not in DISK_ERRNOS and (
            error.errno not in PATH_ERRNOS or not where.absolute().is_relative_to(directory.absolute())
        ):
            raise
        raise ConfigError(
            f"{where} cannot be read or written on {socket.gethostname()}: {error.strerror}; see to the disk or its permissions, then start again"
        ) from error


@contextlib.contextmanager
def exit_on_user_error(*, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """End the process with the error's exit code and its message alone when the user is at fault.

    Most such errors occur on all ranks alike: rank 0 speaks at once, the others a little later, by when the launcher has usually ended them.
    """
    try:
        yield
    except Share4VError as error:
        if rank and not isinstance(error, RunStopped):
            time.sleep(3.0)
        where = f"rank {rank}: " if ranks > 1 else ""
        if not (rank and isinstance(error, RunStopped)):
            print(f"{error.word}: {where}{error}", file=sys.stderr, flush=True)
        # Peers may still be in a collective: leave without waiting for them.
        sys.stderr.flush()
        os._exit(error.exit_code)

"""One job at a time in a run directory: two would write the same checkpoints and metrics. A lock of the operating system (flock) on job.lock.

The kernel, or the file server, gives the lock back when its holder dies, however that happens; what the file says is for people. No torch here: the
supervisor looks as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_share4v.errors import RunDirectoryInUse
from megatron_share4v.logging import get_logger

FILE = "job.lock"
MOMENT_S, LEASE_S, POLL_S = 2.0, 120.0, 0.2
"""So long a start waits for a lock: a moment, for someone may only look; as long as an NFS server keeps it for a client that died, if that is another host."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What flock says on a file system without it (Lustre mounted without `flock`, NFS without its lock service)."""


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """The run directory is this process's for the length of the block. Raises RunDirectoryInUse, which names the holder, when it stays another's.

    A file system without locks is told once, as a warning: nothing keeps a second job away there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / FILE, "a+", encoding="utf-8") as file:
        _take(file, directory)
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC\n"
        )
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def check_free(directory: Path) -> None:
    """Raises RunDirectoryInUse when a living job trains in the run directory."""
    path = directory / FILE
    if path.exists():
        # NFS gives such a lock only on a file that may be written.
        with open(path, "r+", encoding="utf-8") as file:
            if _try(file) is False:
                raise _occupied(directory, _holder(file))


def _take(file: TextIO, directory: Path) -> None:
    began, told = time.monotonic(), False
    while (taken := _try(file)) is False:
        holder, waited = _holder(file), time.monotonic() - began
        elsewhere = f" on {socket.gethostname()}, " not in holder
        if waited > (LEASE_S if elsewhere else MOMENT_S):
            raise _occupied(directory, holder)
        if elsewhere and waited > MOMENT_S and not told:
            told = True
            get_logger().warning(
                "%s is locked by %s; waiting up to %.0f s, in case that host has died",
                directory / FILE,
                holder,
                LEASE_S,
            )
        time.sleep(POLL_S)
    if taken is None:
        get_logger().warning(
            "%s: this file system has no locks, so nothing keeps a second job from training in the same run directory",
            directory / FILE,
        )


def _try(file: TextIO) -> bool | None:
    """Whether the lock is now held by `file`; None where there is no such thing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _occupied(directory: Path, holder: str) -> RunDirectoryInUse:
    return RunDirectoryInUse(
        f"{directory} is being trained in by {holder}. Wait for it, end it, or give this run another run.directory. (If that host is gone and its file "
        f"server does not notice, remove {FILE} there.)"
    )

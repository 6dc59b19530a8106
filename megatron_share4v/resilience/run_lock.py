"""Lock of a run directory (flock on job.lock): two jobs would write the same checkpoints and metrics.

The kernel, or the NFS server, releases the lock when its holder dies, however that happens; the text in the file is for
people. The supervisor imports this module, so torch is imported only in the collective functions.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_share4v.errors import RunDirectoryInUse, disk_errors_as_config_error
from megatron_share4v.files import try_lock
from megatron_share4v.logging import get_logger
from megatron_share4v.resilience.heartbeat import Heartbeat

FILE = "job.lock"
LOCAL_WAIT_S = 2.0
"""How long a start waits for a lock held on this host: another process may only be testing it."""
NFS_LEASE_S = 120.0
"""How long a start waits for a lock held on another host: an NFS server keeps the lock of a dead client this long."""
POLL_S = 0.2


@contextlib.contextmanager
def exclusive_run(directory: Path, *, rank: int) -> Iterator[None]:
    """Hold the lock of the run directory on rank 0 and clear the heartbeat files of an earlier job. Collective.

    Raises RunDirectoryInUse on all ranks, without a change to the directory, when another job holds the lock. All ranks
    end with the same exit code: a scheduler that sees another code from a killed rank would start the job again.
    """
    from megatron_share4v.parallel.collectives import run_on_rank0

    with contextlib.ExitStack() as stack:

        def lock() -> None:
            with disk_errors_as_config_error(directory):
                stack.enter_context(lock_run_directory(directory))
                Heartbeat.clear(directory)

        run_on_rank0(lock)
        yield


@contextlib.contextmanager
def lock_run_directory(directory: Path) -> Iterator[None]:
    """Hold the lock of the run directory for the length of the block; RunDirectoryInUse names another holder.

    On a file system without locks it only warns, once: a second job is not kept out there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / FILE, "a+", encoding="utf-8") as file:
        _acquire(file, directory)
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started} UTC\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def check_unlocked(directory: Path) -> None:
    """Raise RunDirectoryInUse when a living job holds the lock of the run directory."""
    path = directory / FILE
    if path.exists():
        # NFS grants an exclusive lock only on a file that is open for writing.
        with open(path, "r+", encoding="utf-8") as file:
            if try_lock(file) is False:
                raise _in_use(directory, _read_holder(file))


def _acquire(file: TextIO, directory: Path) -> None:
    started, warned = time.monotonic(), False
    while (taken := try_lock(file)) is False:
        holder, waited = _read_holder(file), time.monotonic() - started
        remote = f" on {socket.gethostname()}, " not in holder
        if waited > (NFS_LEASE_S if remote else LOCAL_WAIT_S):
            raise _in_use(directory, holder)
        if remote and waited > LOCAL_WAIT_S and not warned:
            warned = True
            message = "%s is locked by %s; waiting up to %.0f s, in case that host has died"
            get_logger().warning(message, directory / FILE, holder, NFS_LEASE_S)
        time.sleep(POLL_S)
    if taken is None:
        get_logger().warning(
            "%s: this file system has no locks, so nothing keeps a second job from training in the same run directory",
            directory / FILE,
        )


def _read_holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _in_use(directory: Path, holder: str) -> RunDirectoryInUse:
    return RunDirectoryInUse(
        f"{directory} is being trained in by {holder}. Wait for it, end it, or give this run another run.directory. "
        f"(If that host is gone and its file server does not notice, remove {FILE} there.)"
    )

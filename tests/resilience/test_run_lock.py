"""Run directory lock: a second job is refused while the first one runs, and continues after it was killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

import pytest
from fault_injection import Job, train
from launching import lines

from megatron_share4v.errors import RunDirectoryInUse
from megatron_share4v.resilience import run_lock
from megatron_share4v.resilience.rank_state import read_states
from megatron_share4v.resilience.supervisor import RestartPolicy, Supervisor


def test_second_job_is_refused_until_the_first_has_died(runs) -> None:
    """Loader processes of a killed rank must not keep its lock."""
    directory, go = runs.root / "twice", runs.root / "go"
    first = Job(
        runs.config, 2, f"run.directory={directory}", "data.num_workers=1", faults=f"wait_for:0:5:{go},kill:0:5"
    )
    while len(lines(directory / "metrics.jsonl")) < 4:
        assert first.processes[0].is_alive()
        time.sleep(0.05)
    in_use = f"{directory} is being trained in by process {first.processes[0].pid} on {socket.gethostname()}, since 20"
    second = train(runs.config, 2, f"run.directory={directory}")
    assert (
        second.codes[0] == 2
        and set(second.codes) <= {2, -15}
        and f"error: rank 0: {in_use}" in second.output
        and "Traceback" not in second.output
    ), second.output
    with pytest.raises(RunDirectoryInUse, match=in_use):
        Supervisor(["false"], directory, RestartPolicy()).supervise()
    assert [state.pid for state in read_states(directory / "watch")] == [process.pid for process in first.processes], (
        "state files of the first job are unchanged"
    )
    assert not (directory / "log" / "errors.txt").exists() and not (directory / "restarts.jsonl").exists()
    go.touch()
    outcome = first.wait()
    assert outcome.codes[0] == -9, outcome.output
    again = train(runs.config, 2, f"run.directory={directory}")
    assert again.codes == [0, 0] and "at step 3" in again.output and runs.curve(directory) == runs.reference, (
        again.output
    )
    assert (directory / run_lock.FILE).read_text() == "", "the lock is released"


def test_start_waits_for_the_lock_of_a_dead_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An NFS server releases the lock of a dead client only after its lease has expired."""
    monkeypatch.setattr(run_lock, "LOCAL_WAIT_S", 0.0)
    monkeypatch.setattr(run_lock, "POLL_S", 0.0)
    monkeypatch.setattr(logging.getLogger("megatron_share4v"), "propagate", True)
    with open(tmp_path / run_lock.FILE, "w") as other:
        other.write("process 7 on elsewhere, since 2026-01-01 00:00:00 UTC\n")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(other, fcntl.LOCK_UN))
        with run_lock.lock_run_directory(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / run_lock.FILE).read_text()
        assert "is locked by process 7 on elsewhere" in caplog.text and "in case that host has died" in caplog.text
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(run_lock, "NFS_LEASE_S", -1.0)
        with (
            pytest.raises(RunDirectoryInUse, match="another process.*remove job.lock there"),
            run_lock.lock_run_directory(tmp_path),
        ):
            pass


def test_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(logging.getLogger("megatron_share4v"), "propagate", True)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock.lock_run_directory(tmp_path):
        run_lock.check_unlocked(tmp_path)
    assert "this file system has no locks, so nothing keeps a second job" in caplog.text
    monkeypatch.setattr(
        fcntl, "flock", lambda file, operation: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    with pytest.raises(OSError, match="Input/output"), run_lock.lock_run_directory(tmp_path):
        pass

"""Signals and os._exit in a test run are reported (signal_guard.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import os, signal
from megatron_share4v.errors import ConfigError, exit_on_user_error
def test_leaves():
    with exit_on_user_error():
        raise ConfigError("x")
def test_child_may_leave():
    child = os.fork()
    if not child:
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
def test_child_is_ended():
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -15
def test_is_ended():
    os.kill(os.getpid(), signal.SIGTERM)
def test_never_begins():
    pass
"""


def test_signal_and_exit_are_reported(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = os.environ | {"PYTHONPATH": f"{repository}:{repository / 'tests'}"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "signal_guard",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            tmp_path,
            tmp_path,
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 128 + 15 and "ended from outside, by SIGTERM" in done.stdout, done.stdout
    assert "1 failed, 2 passed" in done.stdout, "test_leaves exited the process, or a child could not exit"

"""The console of a run shows only log lines of the project; upstream warnings are in the log files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from launching import finish, start

LINE = re.compile(r"\d\d:\d\d:\d\d (?!.*Warning)\S")
OTHER_WARNING = """
import sys, warnings, pathlib
from megatron_share4v import logging, mcore
warnings.warn("before")
logging.configure(rank=int(sys.argv[1]), directory=pathlib.Path(sys.argv[2]))
warnings.warn("after")
logging.get_logger().info("some progress")
logging.get_logger().error("some failure")
"""


def test_training_start_logs_no_upstream_warning(runs, tmp_path: Path) -> None:
    """Every console line starts with the time of day, from the first import to the last save."""
    overrides = (f"run.directory={tmp_path}", "parallel.tensor=2", "precision.dtype=bf16", "train.steps=2")
    output = finish(start(runs.config, 2, *overrides))
    assert "step 2/2" in output
    assert [line for line in output.splitlines() if not LINE.match(line)] == []
    for rank in range(2):
        assert "UserWarning: Apex is not installed" in (tmp_path / "log" / f"rank{rank}.txt").read_text()


def test_unlisted_warnings_reach_the_console_of_rank_0(tmp_path: Path) -> None:
    """Other ranks show only errors; every log file has all lines, including those logged before it was opened."""
    shown, logged = [], []
    for rank in range(2):
        command = [sys.executable, "-c", OTHER_WARNING, str(rank), str(tmp_path)]
        shown.append(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
        logged.append((tmp_path / f"rank{rank}.txt").read_text())
    assert all("UserWarning: before" in text and "UserWarning: after" in text for text in [*logged, shown[0]])
    assert re.search(r"^\d\d:\d\d:\d\d some progress$", shown[0], re.MULTILINE), shown[0]
    assert "after" not in shown[1] and "some progress" not in shown[1]
    assert re.search(r"^\d\d:\d\d:\d\d \[rank 1\] some failure$", shown[1], re.MULTILINE), shown[1]

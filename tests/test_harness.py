"""What starts processes for the other tests: ranks have what they need imported already, and a forked tool ends as a started one does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from forked_tools import ROOT, Tool, run_tool
from harness import PRELOAD, run_world

from megatron_share4v.data.loading.workers import ordered_map

WAITS = "import os, sys, time\nprint('here', os.environ['RANK'], *sys.argv[1:], file=sys.stderr)\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)\n"


def missing() -> set[str]:
    return set(PRELOAD) - set(sys.modules)


def test_ranks_find_everything_imported_also_after_a_loader() -> None:
    assert list(ordered_map(abs, [-1], num_workers=1, prefetch=1)) == [1]
    assert run_world(2, missing) == [set(), set()]


def test_a_forked_tool_says_and_ends_what_a_started_one_does() -> None:
    for arguments in ((), ("--help",), ("nowhere.yaml",)):
        started = subprocess.run(
            [sys.executable, "tools/train.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        forked = run_tool("tools/train.py", *arguments)
        assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_ranks_are_ended_with_the_one_that_failed(tmp_path: Path) -> None:
    (tmp_path / "sync_detector.py").write_text(WAITS)
    done = run_tool(tmp_path / "sync_detector.py", "there", ranks=2, merged=True, timeout=50)
    assert (
        done.returncode == 7
        and sorted(done.stdout.splitlines()) == ["here 0 there", "here 1 there"]
        and done.stderr == ""
    )


def test_a_signal_is_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "sync_detector.py").write_text(WAITS)
    tool = Tool(tmp_path / "sync_detector.py", environment={"RANK": "0"})
    tool.send_signal(signal.SIGKILL)
    tool.communicate(timeout=50)
    assert tool.returncode == -signal.SIGKILL and tool.poll() == tool.returncode

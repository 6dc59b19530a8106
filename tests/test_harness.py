"""Fork server for tests: ranks find PRELOAD imported, and a forked tool behaves like a started one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from forked_tools import ROOT, Tool, run_tool
from harness import PRELOAD, run_world

from megatron_share4v.data.loading.workers import ordered_map

FAIL_ON_RANK_1 = """
import os, sys, time
print('here', os.environ['RANK'], *sys.argv[1:], file=sys.stderr)
sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)
"""


def find_missing_imports() -> set[str]:
    return set(PRELOAD) - set(sys.modules)


def test_fork_server_has_preloaded_modules_after_a_data_loader() -> None:
    assert list(ordered_map(abs, [-1], num_workers=1, prefetch=1)) == [1]
    assert run_world(2, find_missing_imports) == [set(), set()]


def test_forked_tool_has_output_and_exit_code_of_a_started_one() -> None:
    for arguments in ((), ("--help",), ("nowhere.yaml",)):
        started = subprocess.run(
            [sys.executable, "tools/train.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        forked = run_tool("tools/train.py", *arguments)
        assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_failed_rank_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "fail_on_rank_1.py").write_text(FAIL_ON_RANK_1)
    done = run_tool(tmp_path / "fail_on_rank_1.py", "there", ranks=2, merged=True, timeout=50)
    assert (
        done.returncode == 7
        and sorted(done.stdout.splitlines()) == ["here 0 there", "here 1 there"]
        and done.stderr == ""
    )


def test_exit_code_is_the_negative_signal_number(tmp_path: Path) -> None:
    (tmp_path / "fail_on_rank_1.py").write_text(FAIL_ON_RANK_1)
    tool = Tool(tmp_path / "fail_on_rank_1.py", environment={"RANK": "0"})
    tool.send_signal(signal.SIGKILL)
    tool.communicate(timeout=50)
    assert tool.returncode == -signal.SIGKILL and tool.poll() == tool.returncode

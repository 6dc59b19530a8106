"""All shell scripts parse as bash, and the launch scripts pass shellcheck."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted([*(ROOT / "examples" / "launch").iterdir(), *(ROOT / "examples" / "slurm").iterdir()])
SCRIPTS = sorted(
    [*LAUNCHERS, *ROOT.glob("tools/*.sh"), *ROOT.glob("tests/**/*.sh"), *ROOT.glob("examples/quickstart/*.sh")]
)
names = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())


@names
def test_script_parses_as_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_launch_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck on PATH")
    done = subprocess.run(["shellcheck", "-x", *LAUNCHERS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    planted = subprocess.run(["shellcheck", "-"], input="#!/bin/bash\nrm $1\n", capture_output=True, text=True)
    assert "SC2086" in planted.stdout

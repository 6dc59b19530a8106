"""Launchers of tools/train.py for tests: under torchrun, as one process, or forked without torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from forked_tools import LAUNCHER_VARIABLES, ROOT, Tool

TRAIN = ("tools/train.py",)


def start(
    config: Path, ranks: int, *overrides: str, script: tuple[str, ...] = TRAIN, path: str | None = None
) -> subprocess.Popen:
    """Start a run whose stdout holds the output and errors of all ranks. `path`: another PATH, to hide compilers."""
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else [sys.executable]
    )
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES} | {
        "OMP_NUM_THREADS": "1"
    }
    if path is not None:
        environment["PATH"] = path
    return subprocess.Popen(
        [*launcher, *script, str(config), *overrides],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def fork(config: Path, ranks: int, *overrides: str, script: tuple[str, ...] = TRAIN, path: str | None = None) -> Tool:
    """Start a run through forked_tools.py, without torchrun, for tests that do not depend on the launcher."""
    return Tool(
        *script, config, *overrides, ranks=ranks, environment={} if path is None else {"PATH": path}, merged=True
    )


def killed_after(step: int) -> tuple[str, ...]:
    """Return the command prefix of a run whose ranks get SIGKILL after `step` steps."""
    return "tests/train/killed_after.py", str(step)


def finish(process: subprocess.Popen | Tool) -> str:
    """Wait for the process, require exit code 0, and return its output."""
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


def lines(path: Path) -> list[dict]:
    """Read the complete lines of a JSONL file that a run may be writing; [] when it does not exist yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

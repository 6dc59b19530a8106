"""tools/bench_serve.py runs, and engine and transformers give equal answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_measures_engine_and_transformers(repository: Path) -> None:
    command = [
        sys.executable,
        "tools/bench_serve.py",
        "--width",
        "64",
        "--layers",
        "2",
        "--words",
        "5",
        "--new-tokens",
        "4",
        "--rounds",
        "1",
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["who"] for row in rows] == [
        "engine, 1 users",
        "engine, 4 users",
        "engine, 16 users",
        "transformers, one by one",
    ]
    assert all(row["tokens_per_s"] > 0 and row["first_token_s"] > 0 for row in rows)
    assert "greedy answers equal to transformers': 2 of 2" in lines[-1] and "encoder_calls=42" in lines[-1]

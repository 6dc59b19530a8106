"""tools/bench_attacks.py runs: bombs are refused, honest requests and /health are answered beside the attacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_fixtures import write_llava_hf


def test_honest_requests_are_answered_beside_attacks(repository: Path, tmp_path: Path) -> None:
    checkpoint = write_llava_hf(tmp_path / "hf")
    command = [sys.executable, "tools/bench_attacks.py", str(checkpoint), "--attackers", "2", "--rounds", "3"]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3, done.stderr
    scans, idle, kept = rows
    assert scans["statuses"] == [400] and scans["honest_statuses"] == [200]
    assert idle["healthy"], "the server is deaf beside idle connections"
    assert kept["kept_s"] > 0 and done.returncode == int(not all(row["passed"] for row in rows))
    assert "leaves room for 640 connections of 1000" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr) < 1 << 20, "the log does not grow with the attacks"

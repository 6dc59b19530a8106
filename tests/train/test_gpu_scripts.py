"""The scripts that wait for a GPU run, small, where there is none: nothing of theirs is seen there for the first time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def run(repository: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=repository, env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layers_are_compared(repository: Path) -> None:
    output = run(repository, "tests/gpu/layers.py")
    assert "kernels: sdpa equal, varlen not here" in output and "own_fp8: " in output and "engine: not here" in output and "FAILED" not in output
    assert "packed none, recomputed none, fp8 none" in output


def test_training_is_measured(repository: Path, tmp_path: Path) -> None:
    configs = ["--stages", "pretrain", "--pretrain", "examples/quickstart/pretrain.yaml"]
    small = ["--pack", "256", "--packs", "2", "--layers", "2", "--steps", "2", "--matrix", "256", "--text", "30", "--out", str(tmp_path)]
    variants = ["--variants", "bf16", "fp8", "te bf16", "transformers"]
    output = run(repository, "tools/bench_gpu.py", *configs, *small, *variants)
    result = json.loads((tmp_path / "training.json").read_text())
    assert result["device"] == "cpu" and result["peaks"]["bf16"] > 0
    rows = {row["variant"]: row for row in result["rows"]}
    assert len(rows) == 4 and "built without CUDA" in rows["te bf16"]["refused"]
    for variant in ("bf16", "fp8", "transformers"):
        row = rows[variant]
        assert "refused" not in row, row
        assert row["layers"] == 2 and len(row["losses"]) == 5 and row["losses"][-1] < row["losses"][0] and row["tokens_per_s"] > 0, row
    truth, fp8 = rows["bf16"]["losses"], rows["fp8"]["losses"]
    assert truth != fp8 and max(abs(a - b) / b for a, b in zip(fp8, truth)) < 0.05
    assert rows["bf16"]["model_tflops"] < rows["bf16"]["hardware_tflops"]
    assert "| pretrain | bf16 | 2 |" in output and (tmp_path / "training.md").read_text() in output

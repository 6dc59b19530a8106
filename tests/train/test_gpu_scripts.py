"""GPU scripts at small sizes on the CPU, so that every code path is tested without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


def run(repository: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layer_checks_run_on_cpu(repository: Path) -> None:
    output = run(repository, "tests/gpu/layers.py")
    assert (
        "kernels: sdpa equal, varlen not here" in output
        and "own_fp8: " in output
        and "engine: not here" in output
        and "FAILED" not in output
    )
    assert "packed none, recomputed none, fp8 none" in output


def test_bench_gpu_runs_on_cpu(repository: Path, tmp_path: Path) -> None:
    configs = ["--stages", "pretrain", "--pretrain", "examples/quickstart/pretrain.yaml"]
    small = [
        "--pack",
        "256",
        "--packs",
        "2",
        "--layers",
        "2",
        "--steps",
        "2",
        "--matrix",
        "256",
        "--text",
        "30",
        "--out",
        str(tmp_path),
    ]
    variants = ["--variants", "bf16", "fp8", "te bf16", "transformers"]
    output = run(repository, "tools/bench_gpu.py", *configs, *small, *variants)
    result = json.loads((tmp_path / "training.json").read_text())
    assert result["device"] == "cpu" and result["peaks"]["bf16"] > 0
    rows = {row["variant"]: row for row in result["rows"]}
    assert len(rows) == 4 and "built without CUDA" in rows["te bf16"]["refused"]
    for variant in ("bf16", "fp8", "transformers"):
        row = rows[variant]
        assert "refused" not in row, row
        assert (
            row["layers"] == 2
            and len(row["losses"]) == 5
            and row["losses"][-1] < row["losses"][0]
            and row["tokens_per_s"] > 0
        ), row
    truth, fp8 = rows["bf16"]["losses"], rows["fp8"]["losses"]
    assert truth != fp8 and max(abs(a - b) / b for a, b in zip(fp8, truth)) < 0.05
    assert rows["bf16"]["model_tflops"] < rows["bf16"]["hardware_tflops"]
    assert "| pretrain | bf16 | 2 |" in output and (tmp_path / "training.md").read_text() in output


def test_bench_fp8_runs_on_cpu(repository: Path, tmp_path: Path) -> None:
    """Compare our own recipe, whose numbers equal those on a GPU; unavailable recipes are reported and do not fail."""
    widths = (
        "language.hidden_size=64",
        "language.intermediate_size=128",
        "language.num_layers=2",
        "language.num_attention_heads=4",
    )
    tower = (
        "vision.hidden_size=64",
        "vision.intermediate_size=128",
        "vision.num_layers=3",
        "vision.num_attention_heads=4",
    )
    sizes = [
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "optim.learning_rate=2e-3",
        *(f"model.{setting}" for setting in (*widths, "language.num_key_value_heads=4", *tower)),
    ]
    variants = ["bf16, halves", "tensorwise", "te blockwise"]
    small = ["--out", str(tmp_path), "--steps", "12", "--window", "4", "--scenes", "64", "--bound", "0.05"]
    output = run(repository, "tools/bench_fp8.py", *small, "--variants", *variants, "--set", *sizes)
    result = json.loads((tmp_path / "fp8.json").read_text())
    found = result["variants"]
    assert (
        list(found) == ["bf16", *variants]
        and "built without CUDA" in found["te blockwise"]["refused"]
        and "te blockwise   not run" in output
    )
    assert all(
        len(found[name]["losses"]) == 12 and found[name]["losses"][-1] < found[name]["losses"][0]
        for name in list(found)[:3]
    )
    assert found["bf16"]["gap"]["step"] == 0 < found["bf16, halves"]["gap"]["window"]
    assert (
        result["holds"]
        and 0
        < result["largest_gap"]
        == found["tensorwise"]["gap"]["window"]
        <= found["tensorwise"]["gap"]["step"]
        < 0.05
    )
    assert (tmp_path / "fp8.png").stat().st_size > 1000 and "holds" in output


def load_tool(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load a tool as a module, under a name that dataclasses can find and with its folder on the import path."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("above", "code"), [(0.009, 0), (0.011, 1)])
def test_a_gap_above_one_percent_fails(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: float, code: int
) -> None:
    """Fail when the gap of a window exceeds one percent; single steps may exceed it through rounding."""
    bench = load_tool(repository / "tools" / "bench_fp8.py", monkeypatch)
    truth = [6.0 - 0.02 * step for step in range(200)]
    curves = {
        "bf16": truth,
        "tensorwise": [loss * (1 + above * (90 <= step < 100)) for step, loss in enumerate(truth)],
        "te delayed": [loss * (1 + 0.05 * (step == 50)) for step, loss in enumerate(truth)],
    }

    def train(variant: str, arguments: object) -> object:
        return (
            bench.Curve(variant, tuple(curves[variant]))
            if variant in curves
            else bench.Curve(variant, refused="not here")
        )

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(
        sys, "argv", ["bench_fp8", "--out", str(tmp_path), "--variants", "tensorwise", "te delayed", "te mxfp8"]
    )
    with pytest.raises(SystemExit) as end:
        bench.main()
    result = json.loads((tmp_path / "fp8.json").read_text())
    assert end.value.code == code and result["largest_gap"] == pytest.approx(above)
    assert result["variants"]["tensorwise"]["gap"]["at_step"] == 100 and result["variants"]["te delayed"]["gap"][
        "step"
    ] == pytest.approx(0.05)


def test_scaling_predictions_match_bench_gpu_settings(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that docs/scaling.md has a row with the same settings for each of our variants."""
    from megatron_share4v.planner import scaling

    bench = load_tool(repository / "tools" / "bench_gpu.py", monkeypatch)
    assert {stage: text for stage, (text, _) in bench.TEXT.items()} == scaling.BENCH_TEXT
    assert set(bench.BF16_STATE) <= set(scaling.BENCH_SETTINGS)
    own = {name: changes for name, changes in bench.VARIANTS.items() if not name.startswith("transformers")}
    assert {
        name: tuple(change for change in changes if not change.startswith("attention="))
        for name, changes in own.items()
    } == scaling.BENCH

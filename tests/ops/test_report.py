"""Report of the ops, and the GPU script's output where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from megatron_share4v.ops.build import find_toolchain
from tools.op_cases import OPS

TOOLCHAIN = find_toolchain()
needs_nvcc = pytest.mark.skipif(TOOLCHAIN is None or TOOLCHAIN.nvcc is None, reason="no nvcc on PATH")


@pytest.fixture
def tool(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_ops", repository / "tools/report_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(path: Path, *, shape: str) -> Path:
    """Write the output of tools/bench_ops.py for one op."""
    row = {
        "op": "rms_norm",
        "shape": shape,
        "direction": "fwd",
        "megabytes": 203.4,
        "native_us": 51.0,
        "eager_us": 102.0,
    }
    row |= {"compiled_us": None, "gigabytes_per_s": 3988.0, "of_copy": 0.93}
    head = {
        "command": "tools/bench_ops.py",
        "date": "2026-01-01",
        "machine": "a machine",
        "threads": 1,
        "torch": "2",
        "ops": "native",
        "copy_gb_s": 4300.0,
    }
    path.write_text("op shape\nrms_norm\n" + json.dumps(head | {"rows": [row]}))
    return path


@needs_nvcc
def test_report_marks_unmeasured_ops(tool: ModuleType, tmp_path: Path) -> None:
    tool.main(["--output", str(tmp_path / "ops.md")])
    text = (tmp_path / "ops.md").read_text()
    shapes = {(op.name, bench.name) for op in OPS for bench in op.benches() if bench.where == "gpu"}
    assert {op for op, _ in shapes} == {op.name for op in OPS}, "an op has no shape of the 7B model"
    for op, shape in shapes:
        assert any(
            line.startswith(f"| {op} | {shape} | fwd |") and line.endswith("| not measured |")
            for line in text.splitlines()
        ), (op, shape)
    assert text.count("\nNot measured.") == 2
    assert "not compiled" not in text and "| rms_norm | language 7B | fwd | 203.4 | 47.3 | not measured |" in text


@needs_nvcc
def test_report_shows_measurements_beside_floors(tool: ModuleType, tmp_path: Path) -> None:
    tool.main(["--output", str(tmp_path / "ops.md"), "--gpu", str(results(tmp_path / "gpu.txt", shape="language 7B"))])
    text = (tmp_path / "ops.md").read_text()
    assert "| rms_norm | language 7B | fwd | 203.4 | 47.3 | 51.0 |" in text
    assert (
        "| rms_norm | language 7B | fwd | 203.40 | 51 | 102 | 2.00 | - | - | 3988.0 | 0.93 |" in text
        and "`tools/bench_ops.py` on 2026-01-01" in text
    )


@needs_nvcc
def test_committed_report_has_all_ops(repository: Path) -> None:
    text = (repository / "docs/measurements/ops.md").read_text()
    missing = [op.name for op in OPS if f"\n| {op.name} |" not in text]
    assert not missing, f"write it again (tools/report_ops.py): {missing}"


def test_gpu_script_without_a_gpu_says_so(repository: Path, tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    command = ["bash", str(repository / "tests/gpu/run.sh"), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": str(tmp_path)}
    )
    assert done.returncode == 0 and "nothing was compared and nothing was measured" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()

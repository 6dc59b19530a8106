"""Preparation benchmark on a small input: record counts and measurements of each stage."""

import runpy
from pathlib import Path

BENCH = Path(__file__).parents[3] / "tools" / "bench_prepare.py"


def test_it_measures_each_stage(tmp_path: Path, tokenizer_path: Path, capsys):
    bench = runpy.run_path(str(BENCH), run_name="bench_prepare")
    found = bench["bench_prepare"](tmp_path, records=300, tokenizer=tokenizer_path)
    assert found["records"] == 300 and found["annotations_bytes"] > 300 * 800
    assert all(
        found[f"{stage}_s"] >= 0 and found[f"{stage}_peak_mib"] > 0 for stage in ("write", "read", "build", "open")
    )
    assert capsys.readouterr().out.count("records/s") == 4

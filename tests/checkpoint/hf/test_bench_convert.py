"""tools/bench_convert.py: the line through its measurements, and what it reports as a failure."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCH = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "bench_convert.py"))


def measured(gb: float, *, ratio: float = 1.5, memory: float = 0.5) -> dict[str, float]:
    found = {"layers": 2, "gb": gb, "largest_shard_gb": min(gb, 5.0), "file_gb": 5.0}
    return found | {
        f"{command}_{key}": value
        for command in ("import", "export")
        for key, value in (("over_copy", ratio), ("peak_over_start_gb", memory))
    }


def test_line() -> None:
    slope, start = BENCH["line_through"]([(1.0, 2.0), (2.0, 2.5), (5.0, 4.0)])
    assert slope == pytest.approx(0.5) and start == pytest.approx(1.5)


def test_a_good_one_has_no_problems_and_says_what_13b_needs() -> None:
    lines, problems = BENCH["check_limits"](
        [measured(1, memory=0.50), measured(2, memory=0.51), measured(4, memory=0.53)], hidden=5120
    )
    assert problems == []
    assert lines[0] == "import: +0.0100 GB of memory per GB of model; at 13B (26.7 GB) 0.76 GB of at most 6.07"


def test_failures_are_named() -> None:
    good = [measured(1), measured(2)]
    assert (
        BENCH["check_limits"]([measured(1, ratio=9.0), measured(2)], hidden=5120)[1] == []
    )  # start-up dominates a small model
    _, problems = BENCH["check_limits"]([*good, measured(4, ratio=2.01)], hidden=5120)
    assert len(problems) == 2 and "import of 4 GB took 2.01 times as long as a copy" in problems[0]
    _, problems = BENCH["check_limits"]([measured(0.5, memory=1.7)], hidden=5120)
    assert len(problems) == 2 and "needed 1.7 GB, at most 1.57" in problems[0]
    _, problems = BENCH["check_limits"]([measured(1, memory=0.5), measured(2, memory=0.8)], hidden=5120)
    assert len(problems) == 2 and "would need 8.21 GB at 13B, at most 6.07" in problems[0]
    assert len(BENCH["check_limits"]([measured(1), measured(2)], hidden=2048)[1]) == 0

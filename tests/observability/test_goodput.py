"""Wall-clock accounting: every second is in exactly one account, across a crash and a restart."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from megatron_share4v.observability.goodput import (
    ACCOUNTS,
    PICTURE,
    CommunicationTimer,
    GoodputTracker,
    draw_goodput,
    goodput_figure,
)
from megatron_share4v.observability.records import read_lines
from megatron_share4v.parallel.device import Device


class ManualClock:
    """A clock that the test advances."""

    def __init__(self, start: float) -> None:
        self.value = start

    def __call__(self) -> float:
        return self.value


def write(metrics: Path, step: int, line: dict[str, float]) -> None:
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step} | line) + "\n")


def run_steps(
    tracker: GoodputTracker, clock: ManualClock, metrics: Path, steps: range, *, save_after: int
) -> list[dict[str, float]]:
    """Account steps of 1 s data wait and 10 s training, with 2 s of other work after each and one save of 5 s."""
    lines = []
    for step in steps:
        clock.value += 1 + 10
        lines.append(tracker.account_step(step_s=10.0, data_wait_s=1.0))
        write(metrics, step, lines[-1])
        clock.value += 2
        if step == save_after:
            with tracker.time_save():
                clock.value += 5
    return lines


def test_every_second_is_accounted_once_across_a_crash(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    begun = psutil.Process().create_time()
    clock = ManualClock(begun + 100)
    tracker = GoodputTracker(metrics, device=Device("cpu"), start_step=0, now=clock)
    clock.value += 7  # opening data sets and reading weights
    first = run_steps(tracker, clock, metrics, range(1, 6), save_after=3)
    assert first[0]["restart_s"] == pytest.approx(107) and first[0]["other_s"] == 0
    assert [line["checkpoint_s"] for line in first] == [0, 0, 0, 5, 0] and first[3]["other_s"] == pytest.approx(2)
    # Crash: steps 4 and 5 are trained again from the checkpoint of step 3, ten minutes later.
    crash = first[-1]["time"]
    clock.value = crash + 600
    again = GoodputTracker(metrics, device=Device("cpu"), start_step=3, now=clock)
    clock.value += 20
    second = run_steps(again, clock, metrics, range(4, 7), save_after=0)
    assert second[0]["lost_s"] == pytest.approx(crash - first[2]["time"]) and second[0]["restart_s"] == pytest.approx(
        620
    )
    assert all(line["lost_s"] == line["restart_s"] == 0 for line in second[1:])
    kept = [*first[:3], *second]
    assert sum(line[name] for line in kept for name in ACCOUNTS) == pytest.approx(kept[-1]["time"] - begun)
    assert kept[-1]["goodput"] == pytest.approx(sum(line["compute_s"] for line in kept) / (kept[-1]["time"] - begun))


def test_exposed_communication_equals_the_timed_seconds(tmp_path: Path) -> None:
    tracker = GoodputTracker(tmp_path / "none", device=Device("cpu"), start_step=0)
    with tracker.communication.time():
        time.sleep(0.02)
    line = tracker.account_step(step_s=0.5, data_wait_s=0.0)
    assert 0.02 <= line["exposed_communication_s"] < 0.4
    assert line["compute_s"] == pytest.approx(0.5 - line["exposed_communication_s"])
    assert tracker.account_step(step_s=0.1, data_wait_s=0.0)["exposed_communication_s"] == 0


def test_a_failing_block_is_not_counted() -> None:
    timer = CommunicationTimer(Device("cpu"))
    with pytest.raises(ValueError, match="reason"), timer.time():
        raise ValueError("reason")
    assert timer.read() == 0


def test_chart_shows_accounts_and_is_skipped_without_data(tmp_path: Path) -> None:
    draw_goodput(tmp_path)
    assert not (tmp_path / PICTURE).exists()
    metrics = tmp_path / "metrics.jsonl"
    write(metrics, 1, {})  # line format before time accounting existed
    draw_goodput(tmp_path)
    assert not (tmp_path / PICTURE).exists()
    clock = ManualClock(psutil.Process().create_time() + 50)
    tracker = GoodputTracker(metrics, device=Device("cpu"), start_step=0, now=clock)
    run_steps(tracker, clock, metrics, range(2, 40), save_after=20)
    draw_goodput(tmp_path)
    assert Image.open(tmp_path / PICTURE).size == (1000, 380) and (tmp_path / PICTURE).stat().st_size < 60_000
    figure = goodput_figure(read_lines(metrics, "time", *ACCOUNTS))
    [axes], [legend] = figure.axes, figure.legends
    drawn = {text.get_text().split("  ")[0] for text in legend.get_texts()}
    assert drawn >= {"compute", "checkpoint", "start"} and len(axes.collections) == len(ACCOUNTS)
    assert all(layer.get_paths()[0].vertices[:, 1].max() <= 100.001 for layer in axes.collections)
    assert axes.get_title().startswith("goodput ") and axes.get_ylabel() == "share of time, %"

"""Every second of a run is on one account, across a crash and a restart; the clock sees what it watches alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from megatron_share4v.observability.goodput import ACCOUNTS, PICTURE, Clock, Ledger, draw_goodput, goodput_figure
from megatron_share4v.observability.records import read_lines
from megatron_share4v.parallel.device import Device


class Time:
    """A clock that is put forward by hand."""

    def __init__(self, start: float) -> None:
        self.value = start

    def __call__(self) -> float:
        return self.value


def write(metrics: Path, step: int, line: dict[str, float]) -> None:
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step} | line) + "\n")


def run_steps(ledger: Ledger, time: Time, metrics: Path, steps: range, *, save_after: int) -> list[dict[str, float]]:
    """Steps of 10 s after 1 s of waiting; 2 s of something else after each, 5 s of saving after one of them."""
    lines = []
    for step in steps:
        time.value += 1 + 10
        lines.append(ledger.line(step_s=10.0, data_wait_s=1.0))
        write(metrics, step, lines[-1])
        time.value += 2
        if step == save_after:
            with ledger.saving():
                time.value += 5
    return lines


def test_every_second_is_booked_once_across_a_crash(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    begun = psutil.Process().create_time()
    time = Time(begun + 100)
    ledger = Ledger(metrics, device=Device("cpu"), start_step=0, now=time)
    time.value += 7  # data sets are opened, weights are read
    first = run_steps(ledger, time, metrics, range(1, 6), save_after=3)
    assert first[0]["restart_s"] == pytest.approx(107) and first[0]["other_s"] == 0
    assert [line["checkpoint_s"] for line in first] == [0, 0, 0, 5, 0] and first[3]["other_s"] == pytest.approx(2)
    # Killed: steps 4 and 5 are made again from the checkpoint of step 3, ten minutes later.
    crash = first[-1]["time"]
    time.value = crash + 600
    again = Ledger(metrics, device=Device("cpu"), start_step=3, now=time)
    time.value += 20
    second = run_steps(again, time, metrics, range(4, 7), save_after=0)
    assert second[0]["lost_s"] == pytest.approx(crash - first[2]["time"]) and second[0]["restart_s"] == pytest.approx(
        620
    )
    assert all(line["lost_s"] == line["restart_s"] == 0 for line in second[1:])
    kept = [*first[:3], *second]
    assert sum(line[name] for line in kept for name in ACCOUNTS) == pytest.approx(kept[-1]["time"] - begun)
    assert kept[-1]["goodput"] == pytest.approx(sum(line["compute_s"] for line in kept) / (kept[-1]["time"] - begun))


def test_exposed_communication_is_what_is_watched(tmp_path: Path) -> None:
    import time

    chunk = SimpleNamespace(
        config=SimpleNamespace(finalize_model_grads_func=lambda: time.sleep(0.02)), start_param_sync=lambda force: force
    )
    ledger = Ledger(tmp_path / "none", device=Device("cpu"), start_step=0)
    ledger.watch([chunk])
    chunk.config.finalize_model_grads_func()
    assert chunk.start_param_sync(force="result") == "result"
    line = ledger.line(step_s=0.5, data_wait_s=0.0)
    assert 0.02 <= line["exposed_communication_s"] < 0.4
    assert line["compute_s"] == pytest.approx(0.5 - line["exposed_communication_s"])
    assert ledger.line(step_s=0.1, data_wait_s=0.0)["exposed_communication_s"] == 0


def test_a_failing_call_is_not_swallowed() -> None:
    def fail() -> None:
        raise ValueError("reason")

    clock = Clock(Device("cpu"))
    with pytest.raises(ValueError, match="reason"):
        clock.watched(fail)()
    assert clock.read() == 0


def test_picture_shows_the_accounts_and_needs_none(tmp_path: Path) -> None:
    draw_goodput(tmp_path)
    assert not (tmp_path / PICTURE).exists()
    metrics = tmp_path / "metrics.jsonl"
    write(metrics, 1, {})  # as written before there were accounts
    draw_goodput(tmp_path)
    assert not (tmp_path / PICTURE).exists()
    time = Time(psutil.Process().create_time() + 50)
    ledger = Ledger(metrics, device=Device("cpu"), start_step=0, now=time)
    run_steps(ledger, time, metrics, range(2, 40), save_after=20)
    draw_goodput(tmp_path)
    assert Image.open(tmp_path / PICTURE).size == (1000, 380) and (tmp_path / PICTURE).stat().st_size < 60_000
    figure = goodput_figure(read_lines(metrics, "time", *ACCOUNTS))
    [axes], [legend] = figure.axes, figure.legends
    drawn = {text.get_text().split("  ")[0] for text in legend.get_texts()}
    assert drawn >= {"compute", "checkpoint", "start"} and len(axes.collections) == len(ACCOUNTS)
    assert all(layer.get_paths()[0].vertices[:, 1].max() <= 100.001 for layer in axes.collections)
    assert axes.get_title().startswith("goodput ") and axes.get_ylabel() == "share of time, %"

"""metrics.jsonl and samples.jsonl have each step once, also after a resume and a line truncated by a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_share4v.observability.writers import RunWriters, StepRecord


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        grad_norm=1.0,
        learning_rate=1e-3,
        consumed_samples=8 * step,
        trained_tokens=10,
        tokens=100,
        images=8,
        padding_fraction=0.1,
        step_time_s=0.5,
        data_wait_s=0.0,
        tokens_per_s_per_gpu=200.0,
        model_tflops_per_s_per_gpu=0.1,
        mfu=None,
        peak_memory_bytes=1,
        skipped=False,
    )


def open_writers(directory: Path, start: int) -> RunWriters:
    return RunWriters(directory, start_step=start, total_steps=9, console_every=1, sample_keys=True, tensorboard=True)


def test_resume_keeps_each_step_once(tmp_path: Path) -> None:
    writers = open_writers(tmp_path, 0)
    for step in range(1, 6):
        writers.write(record(step, float(step)), keys=[f"k{step}"])
    writers.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    writers = open_writers(tmp_path, 3)
    for step in range(4, 7):
        writers.write(record(step, 10.0 * step), keys=[f"new{step}"])
    writers.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]
    assert lines[0]["mfu"] is None
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["keys"] for line in samples] == [["k1"], ["k2"], ["k3"], ["new4"], ["new5"], ["new6"]]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]

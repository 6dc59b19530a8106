"""Reports at the end of a run: error reports of failed ranks, run card, Weights & Biases, hardware counters."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_injection import train
from launching import lines

from megatron_share4v.config.load import load_run
from megatron_share4v.errors import OpsError
from megatron_share4v.observability.hardware_counters import HardwareCounters, read_gpus
from megatron_share4v.observability.wandb_writer import WandbWriter, check_wandb
from megatron_share4v.observability.writers import RunWriters, StepRecord
from megatron_share4v.resilience.error_report import RankError, format_report, read_rank_errors, summarize

GONE = "RuntimeError: [../gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:4: Connection reset by peer"


def read_card(directory: Path) -> dict:
    return json.loads((directory / "run_card.json").read_text())


@pytest.fixture(scope="module")
def failed(runs) -> tuple[Path, str]:
    """Run directory and output of a run in which one of three ranks raises an exception at step 5."""
    directory = runs.root / "mistaken"
    outcome = train(runs.config, 3, f"run.directory={directory}", "train.global_batch_size=6", faults="raise:1:5")
    assert outcome.codes[1] == 1, outcome.output
    return directory, outcome.output


def test_first_rank_to_fail_is_named_first(failed: tuple[Path, str]) -> None:
    """The other ranks fail after it, with longer tracebacks."""
    directory, output = failed
    assert "first to fail: rank 1 on " in output and ", step 5, compute: ValueError: planted on rank 1" in output
    text = (directory / "log" / "errors.txt").read_text()
    assert text.startswith("first to fail: rank 1 on ") and "in raise_value_error\n    raise ValueError" in text
    assert (
        text.index("ValueError: planted")
        < text.index("its peers were gone")
        < text.index("UTC, rank 1")
        < text.index("UTC, rank 0")
    )
    assert next(error.rank for error in read_rank_errors(directory / "log" / "errors")) == 1


def test_killed_rank_is_reported_without_an_error_report(runs) -> None:
    directory = runs.root / "missed"
    outcome = train(runs.config, 2, f"run.directory={directory}", faults="kill:1:4")
    assert outcome.codes[1] == -9
    assert (
        "the first to notice: rank 0 on " in outcome.output
        and "no error report from rank 1: killed (kill -9" in outcome.output
    ), outcome.output
    for name in ("rank7.json", "rankx.json"):
        (directory / "log" / "errors" / name).write_text("{")
    (directory / "run_card.json").write_text('{"starts": 7}')
    again = train(runs.config, 2, f"run.directory={directory}")
    assert again.codes == [0, 0] and not (directory / "log" / "errors.txt").exists(), (
        "error reports of an earlier start are removed"
    )
    card = read_card(directory)
    assert card["status"] == "finished" and [start["after_step"] for start in card["starts"]] == [3], (
        "a malformed run card is replaced"
    )


def test_errors_are_ordered_by_cause_then_time() -> None:
    errors = [
        RankError(0, "a", 10.0, "step 3, compute", GONE, "tb0"),
        RankError(3, "b", 12.0, "step 3, data", "DataError: x", "tb3"),
        RankError(1, "a", 11.0, "step 3, compute", GONE, "tb1"),
    ]
    errors.sort(key=lambda error: (error.peer_lost, error.at))
    assert summarize(errors, ranks=5).splitlines() == [
        "first to fail: rank 3 on b, step 3, data: DataError: x",
        "then rank 0, 1: its peers were gone",
        "no error report from rank 2, 4: killed (kill -9, out of memory, a lost node), or still running",
    ]
    text = format_report(errors, ranks=5)
    assert text.index("tb3") < text.index("tb0") < text.index("tb1")


def test_card_of_a_finished_run(runs) -> None:
    directory = runs.root / "reference"
    card, metrics = read_card(directory), lines(directory / "metrics.jsonl")
    assert card["status"] == "finished" and card["ended"] >= card["starts"][0]["time"]
    assert card["layout"].startswith("tensor 1 x pipeline 1") and sum(card["machine"]["nodes"].values()) == 2
    assert card["figures"]["steps"] == 8 and card["figures"]["loss"] == {
        str(line["step"]): line["loss"] for line in metrics
    }
    assert (
        card["figures"]["tokens"] == sum(line["tokens"] for line in metrics)
        and card["figures"]["seconds"]["compute"] > 0
    )
    assert card["configuration"]["run"]["seed"] == 5 and card["decisions"]["ops"]["ops"] == "reference"
    assert card["start_weights"] == {"from": "random, seed 5"} and card["data"]["plan"] and card["data"]["tokenizer"]
    assert len(card["code"]["sources"]) == 12 and card["versions"]["torch"]
    text = (directory / "run_card.md").read_text()
    assert (
        text.startswith("# reference\n\nfinished (")
        and "- loss: 1 " in text
        and "random, seed 5" in text
        and "global_batch_size: 4" in text
    )


def test_card_of_a_failed_run_and_of_one_that_starts_from_its_checkpoint(runs, failed: tuple[Path, str]) -> None:
    directory, _ = failed
    card = read_card(directory)
    assert card["status"].startswith("failed: ") and card["figures"]["steps"] == 4
    second = runs.root / "second_stage"
    outcome = train(
        runs.config,
        1,
        f"run.directory={second}",
        f"checkpoint.initialize_from={directory}/checkpoints/latest",
        "train.steps=1",
    )
    assert outcome.codes == [0], outcome.output
    weights = read_card(second)["start_weights"]
    assert (
        weights["from"].endswith("step_00000003")
        and weights["step"] == 3
        and len(weights["contents"]) == 64
        and len(weights["vision"]) == 64
    )


WANDB = """
import json, pathlib
class Run:
    def __init__(self, file): self.file = file
    def log(self, values, step): self.record("log", step, values)
    def finish(self): self.record("finish")
    def record(self, *what):
        with open(self.file, "a") as file: file.write(json.dumps(what) + "\\n")
def init(project, name, id, resume, dir, config):
    if project == "refused": raise ValueError("not logged in")
    run = Run(pathlib.Path(dir) / "calls.jsonl")
    run.record("init", project, name, id, resume, config["run.seed"])
    return run
"""


def record(step: int) -> StepRecord:
    numbers = dict.fromkeys(
        (
            "grad_norm",
            "learning_rate",
            "padding_fraction",
            "step_time_s",
            "data_wait_s",
            "tokens_per_s_per_gpu",
            "model_tflops_per_s_per_gpu",
        ),
        1.0,
    )
    counts = dict.fromkeys(("consumed_samples", "trained_tokens", "tokens", "images", "peak_memory_bytes"), 1)
    return StepRecord(
        step=step,
        loss=0.5,
        mfu=None,
        skipped=False,
        goodput_accounts={"time": 1.0, "goodput": 0.9},
        **numbers,
        **counts,
    )


def test_wandb_receives_the_metrics_of_tensorboard(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub module replaces wandb; two starts of one run have the same run id."""
    config = load_run(runs.config, [f"run.directory={tmp_path / 'run'}", "log.wandb=captions"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(
        OpsError,
        match="log.wandb is 'captions' and the package wandb is not installed; "
        "pip install wandb, or set log.wandb null",
    ):
        check_wandb(config)
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    check_wandb(config)
    for step in (1, 2):
        writers = RunWriters(
            tmp_path / "run",
            start_step=step - 1,
            total_steps=2,
            console_every=1,
            sample_keys=False,
            tensorboard=False,
            wandb=WandbWriter(config),
        )
        writers.write(record(step))
        writers.close()
    first, log, finish, second, *_ = calls = lines(tmp_path / "run" / "calls.jsonl")
    assert first == second == ["init", "captions", "run", first[3], "allow", 5] and len(calls) == 6
    assert (
        log[:2] == ["log", 1]
        and log[2]["train/loss"] == 0.5
        and log[2]["goodput/goodput"] == 0.9
        and "train/mfu" not in log[2]
    )
    assert finish == ["finish"]
    with pytest.raises(OpsError, match="wandb cannot start a run: not logged in; wandb login, or WANDB_MODE=offline"):
        WandbWriter(load_run(runs.config, [f"run.directory={tmp_path / 'run'}", "log.wandb=refused"]))


def test_hardware_counters_with_and_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '97, 61, 650.5, 1980, 70000'\necho '99, 71, [N/A], 1200, 60000'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    expected = {
        "utilization_gpu": 99.0,
        "temperature_gpu": 71.0,
        "power_draw": 650.5,
        "clocks_sm": 1200.0,
        "memory_used": 70000.0,
    }
    assert read_gpus() == {f"gpu/{name}": value for name, value in expected.items()}
    script.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(subprocess.SubprocessError):
        read_gpus()
    counters = HardwareCounters(period_s=0.05)
    deadline, values = time.monotonic() + 30, {}
    while not values and time.monotonic() < deadline:
        time.sleep(0.05)
        values = counters.take()
    counters.close()
    assert values.keys() == {"host/cpu_percent", "host/memory_available_gb"} and values["host/memory_available_gb"] > 0

"""Bad steps (non-finite or spiking): skipped on all ranks, reported with their samples, rolled back when repeated."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from fault_injection import train
from launching import lines
from tolerances import LAYOUT_NORM

from megatron_share4v.config.load import load_run
from megatron_share4v.errors import DataError
from megatron_share4v.resilience.skip_steps import read_skip_steps
from megatron_share4v.resilience.spike_detection import SpikeDetector


def curves_equal(actual: list[list[float]], expected: list[list[float]]) -> bool:
    """Whether two curves are bitwise equal, with NaN equal to NaN."""
    return json.dumps(actual) == json.dumps(expected)


def test_nan_in_one_micro_batch_of_one_rank(runs) -> None:
    directory, listed = runs.root / "nan", runs.root / "listed"
    outcome = train(runs.config, 2, f"run.directory={directory}", faults="nan:1:4:1")
    assert outcome.codes == [0, 0], outcome.output
    metrics = lines(directory / "metrics.jsonl")
    assert [line["skipped"] for line in metrics] == [number == 4 for number in range(1, 9)]
    assert metrics[3]["skip_reason"] == "loss is nan and gradient norm is nan" and curves_equal(
        runs.curve(directory)[:3], runs.reference[:3]
    )
    folder = directory / "bad_steps" / "step_4"
    report = json.loads((folder / "report.json").read_text())
    worst, *others = report["micro_batches"]
    assert (worst["data_rank"], worst["number"]) == (1, 1) and math.isnan(worst["loss"]) and len(others) == 3
    # DP rank r of 2 runs micro-batches r and r + 2 of the step, one sample each: this is the last of the four.
    keys = lines(directory / "samples.jsonl")[3]["keys"]
    assert worst["keys"] == [keys[3]] and sorted(
        key for part in report["micro_batches"] for key in part["keys"]
    ) == sorted(keys)
    assert all(math.isfinite(part["loss"]) for part in others) and set(
        map(math.isnan, report["gradient_norms"].values())
    ) == {True}
    assert (
        "language.decoder.layers.0" in report["gradient_norms"]
        and "projector.mlp.linear_fc1" in report["gradient_norms"]
    )
    assert "Worst: micro-batch 1 of data-parallel rank 1, loss nan; the gradient is not finite in" in outcome.output
    text = (folder / "samples.txt").read_text()
    assert text.startswith("0. ---") and "[[" in text and "1. ---" in text
    # The optimizer state is unchanged: a run with the step on its skip list reaches the same weights.
    listed.mkdir()
    (listed / "skip_steps.jsonl").write_text('{"step": 4, "reason": "a test"}\n')
    outcome = train(runs.config, 2, f"run.directory={listed}")
    assert outcome.codes == [0, 0] and "SKIPPED: a test" in outcome.output and not (listed / "bad_steps").exists(), (
        outcome.output
    )
    assert curves_equal(runs.curve(listed)[4:], runs.curve(directory)[4:]) and not curves_equal(
        runs.curve(listed)[4:], runs.reference[4:]
    )


def test_micro_batch_shared_by_context_ranks_is_reported_once(runs) -> None:
    directory = runs.root / "shared"
    outcome = train(
        runs.config,
        2,
        f"run.directory={directory}",
        "parallel.context=2",
        "train.preview_every_steps=8",
        faults="nan:1:4:1",
    )
    assert outcome.codes == [0, 0], outcome.output
    report = json.loads((directory / "bad_steps" / "step_4" / "report.json").read_text())
    worst, *others = report["micro_batches"]
    keys, line = lines(directory / "samples.jsonl")[3]["keys"], lines(directory / "metrics.jsonl")[3]
    assert (worst["data_rank"], worst["number"], worst["keys"]) == (0, 1, [keys[1]]) and math.isnan(worst["loss"])
    assert sorted(part["number"] for part in others) == [0, 2, 3]
    assert (
        sum(part["trained_tokens"] for part in report["micro_batches"]) == line["trained_tokens"] > 0
        and line["skipped"]
    )
    # Earlier steps equal those of two DP ranks up to the order of summation.
    for actual, expected in zip(runs.curve(directory)[:3], runs.reference[:3]):
        assert actual == pytest.approx(expected, rel=LAYOUT_NORM)


def test_bad_steps_in_a_row_end_the_run(runs) -> None:
    directory = runs.root / "in_a_row"
    outcome = train(
        runs.config,
        2,
        f"run.directory={directory}",
        "train.bad_steps.in_a_row=2",
        faults="nan:0:3:0,nan:0:5:0,nan:0:6:0",
    )
    assert outcome.codes[0] == 2 and "Traceback" not in outcome.output, outcome.output
    assert (
        "error: rank 0: 2 bad steps in a row, 5 to 6, the last because loss is nan" in outcome.output
        and "then roll_back" in outcome.output
    )
    outcome = train(
        runs.config,
        2,
        f"run.directory={runs.root / 'nowhere'}",
        "train.bad_steps.in_a_row=2",
        "train.bad_steps.then=roll_back",
        faults="nan:0:2:0,nan:0:3:0",
    )
    assert outcome.codes[0] == 2 and "holds no checkpoint from before step 1 to roll back to" in outcome.output, (
        outcome.output
    )


def test_kill_after_rollback_gives_the_same_weights(runs) -> None:
    options = ("checkpoint.every_steps=4", "train.bad_steps.in_a_row=2", "train.bad_steps.then=roll_back")
    faults, whole, killed = "nan:1:6:0,nan:1:7:0", runs.root / "rolled", runs.root / "rolled_killed"
    outcome = train(runs.config, 2, f"run.directory={whole}", *options, faults=faults)
    assert outcome.codes == [0, 0] and "rolling back to step 4: 2 bad steps in a row, 6 to 7" in outcome.output, (
        outcome.output
    )
    assert [line["step"] for line in lines(whole / "skip_steps.jsonl")] == [5, 6, 7]
    outcome = train(runs.config, 2, f"run.directory={killed}", *options, faults=f"{faults},kill:0:8")
    assert outcome.codes[0] == -9, outcome.output
    outcome = train(runs.config, 2, f"run.directory={killed}", *options)
    assert outcome.codes == [0, 0] and "at step 4" in outcome.output, outcome.output
    assert [line["skipped"] for line in lines(killed / "metrics.jsonl")] == [False] * 4 + [True] * 3 + [False]
    assert curves_equal(runs.curve(killed)[7:], runs.curve(whole)[7:]) and not curves_equal(
        runs.curve(whole)[7:], runs.reference[7:]
    )


def test_spike_detection_is_equal_after_a_restart(runs) -> None:
    """The run is killed before the spike, so the history of good steps must be restored from metrics.jsonl."""
    options = ("train.bad_steps.gradient_factor=2", "train.bad_steps.window=16")
    whole, killed = runs.root / "spikes", runs.root / "spikes_killed"
    outcome = train(runs.config, 2, f"run.directory={whole}", *options, faults="spike:1:8:30")
    assert outcome.codes == [0, 0], outcome.output
    skipped = [line["skip_reason"] for line in lines(whole / "metrics.jsonl")]
    assert not any(skipped[:7]) and re.match(
        "gradient norm .* is more than 2 times the median .* of the last 7 good steps", skipped[7]
    ), skipped
    assert curves_equal(runs.curve(whole)[:7], runs.reference[:7])
    train(runs.config, 2, f"run.directory={killed}", *options, faults="kill:1:8")
    assert train(runs.config, 2, f"run.directory={killed}", *options, faults="spike:1:8:30").codes == [0, 0]
    assert (
        curves_equal(runs.curve(killed), runs.curve(whole))
        and lines(killed / "metrics.jsonl")[7]["skip_reason"] == skipped[7]
    )


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.distributed_optimizer=false"),
        ("parallel.pipeline=2",),
    ],
)
def test_module_norms_add_up_to_the_gradient_norm(runs, options: tuple[str, ...]) -> None:
    """Check DP, TP with sequence parallelism without distributed optimizer, and PP."""
    directory = runs.root / f"norms{len(options)}"
    bad = ("train.bad_steps.loss_factor=2", "train.bad_steps.window=4", "train.steps=3", "checkpoint.every_steps=0")
    outcome = train(
        runs.config,
        4 if options else 2,
        f"run.directory={directory}",
        *options,
        *bad,
        faults="spike:0:3:60,spike:1:3:60,spike:2:3:60,spike:3:3:60",
    )
    assert outcome.codes == [0] * len(outcome.codes), outcome.output
    report = json.loads((directory / "bad_steps" / "step_3" / "report.json").read_text())
    whole = math.sqrt(sum(norm**2 for norm in report["gradient_norms"].values()))
    assert math.isclose(whole, report["grad_norm"], rel_tol=LAYOUT_NORM) and "times the median" in report["reason"]
    assert len(report["micro_batches"]) == 4 and len(report["gradient_norms"]) == 7


def test_spike_detector(runs) -> None:
    detector = SpikeDetector(
        load_run(runs.config, ["train.bad_steps.loss_factor=3", "train.bad_steps.window=8"]).train.bad_steps, mesh=None
    )
    assert [detector(loss, 1.0) for loss in (1.0, 50.0, 1.0)] == ["", "", ""], (
        "too few steps to compare with; the median tolerates one spike"
    )
    assert detector(3.1, 1.0) == "loss 3.1 is more than 3 times the median 1 of the last 3 good steps"
    assert (
        detector(2.9, 1.0) == ""
        and detector(math.inf, 1.0) == "loss is inf"
        and detector(1.0, math.nan) == "gradient norm is nan"
    )


@pytest.mark.parametrize("line", [b"7", b'{"step": 4', b"\xff"])
def test_read_skip_steps_written_by_hand(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "skip_steps.jsonl").write_bytes(b'\n{"step": 3, "reason": "fine"}\n \n{"step": 3, "reason": "again"}')
    assert read_skip_steps(tmp_path) == {3: "again"}
    (tmp_path / "skip_steps.jsonl").write_bytes(b'{"step": 3, "reason": "fine"}\n' + line)
    with pytest.raises(DataError, match="skip_steps.jsonl:2: .* correct or remove the line"):
        read_skip_steps(tmp_path)


def test_unreadable_skip_list_is_refused(runs) -> None:
    directory = runs.root / "unread"
    directory.mkdir(exist_ok=True)
    (directory / "skip_steps.jsonl").write_text('{"step": 3, "reason": "fine"}\n{"step": 4}\n')
    outcome = train(runs.config, 1, f"run.directory={directory}")
    assert outcome.codes == [2] and "skip_steps.jsonl:2: " in outcome.output, outcome.output

"""Hanging ranks and loader processes in a real run: the report names them, and the job ends with exit code 76."""

from __future__ import annotations

import json

import pytest
from fault_injection import train

QUICK = "watch.step_s=5"


def read_report(directory) -> dict:
    return json.loads((directory / "watch" / "report.json").read_text())


@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_rank_is_named_by_another(runs, rank: int) -> None:
    directory = runs.root / f"stopped{rank}"
    outcome = train(runs.config, 2, f"run.directory={directory}", QUICK, faults=f"stop:{rank}:5")
    assert outcome.codes[1 - rank] == 76 and outcome.codes[rank] == -9, outcome.output
    found = read_report(directory)
    assert found["ranks"] == found["silent"] == [rank], found
    assert (
        f"Differs: rank {rank} (" in found["headline"]
        and "is stopped (SIGSTOP, or a debugger); last seen at step " in found["headline"]
    )
    stacks = (directory / "watch" / f"rank{1 - rank}.stacks.txt").read_text()
    assert "most recent call first" in stacks and "distributed_c10d.py" in stacks, stacks
    text = (directory / "watch" / "report.txt").read_text()
    assert "-> rank " in text and "waits in " in text and "Last events" in text
    again = train(runs.config, 2, f"run.directory={directory}")
    assert again.codes == [0, 0] and "at step 3" in again.output and runs.curve(directory) == runs.reference


def test_rank_missing_from_a_collective_is_named(runs) -> None:
    """The rank is alive and its heartbeat runs, but it never reaches the collective."""
    directory = runs.root / "busy"
    outcome = train(
        runs.config, 3, f"run.directory={directory}", "train.global_batch_size=6", QUICK, faults="sleep:2:3:60"
    )
    # A rank may be ended by SIGTERM before it exits with 76.
    assert 76 in outcome.codes and set(outcome.codes) <= {76, -15}, outcome.output
    found = read_report(directory)
    assert found["ranks"] == [2] and found["silent"] == [] and "the others wait for it" in found["cause"], found
    assert "fault_injection.py" in (directory / "watch" / "rank2.stacks.txt").read_text()
    assert all(
        "most recent call first" in (directory / "watch" / f"rank{rank}.stacks.txt").read_text() for rank in range(3)
    )


def test_hung_loader_process_is_restarted(runs) -> None:
    directory = runs.root / "loader"
    options = ("data.num_workers=1", "data.prefetch=1", "data.worker_timeout_s=3")
    outcome = train(runs.config, 2, f"run.directory={directory}", *options, faults="stop_loader:1:4")
    assert outcome.codes == [0, 0], outcome.output
    log = (directory / "log" / "rank1.txt").read_text()
    assert "hangs: no result for 3 s; restarted at the same request" in log, log
    assert runs.curve(directory) == runs.reference and not (directory / "watch" / "report.json").exists()

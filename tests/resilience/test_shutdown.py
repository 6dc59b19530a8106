"""Stops by a signal to one rank or by the time limit: the run is saved and continues with bitwise equal metrics."""

from __future__ import annotations

import time

import pytest
from fault_injection import train
from launching import lines, start

from megatron_share4v.config.load import load_run
from megatron_share4v.errors import ConfigError
from megatron_share4v.resilience.time_limit import TimeLimit


@pytest.mark.parametrize(("fault", "name"), [("term:1:5", "SIGTERM"), ("usr1:0:5", "SIGUSR1")])
def test_signal_to_one_rank_saves_and_stops_all(runs, fault: str, name: str) -> None:
    directory = runs.root / name
    outcome = train(runs.config, 2, f"run.directory={directory}", faults=fault)
    assert outcome.codes == [75, 75] and "Traceback" not in outcome.output and "error: " not in outcome.output, (
        outcome.output
    )
    assert (
        f"stopped: rank 0: {name} on 1 ranks; saved after step 5 of 8 in {directory / 'checkpoints'}" in outcome.output
    )
    assert [line["step"] for line in lines(directory / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    again = train(runs.config, 2, f"run.directory={directory}")
    assert again.codes == [0, 0] and "at step 5" in again.output and runs.curve(directory) == runs.reference


def test_time_limit_under_torchrun(runs) -> None:
    """The time limit stops the run after the first step; torchrun reports the exit code."""
    directory = runs.root / "limited"
    process = start(
        runs.config, 2, f"run.directory={directory}", "run.time_limit_minutes=1", "checkpoint.before_time_limit_s=60"
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and "exitcode  : 75" in output, output
    assert "stopped: rank 0: its time limit is near; saved after step 1 of 8" in output and "error: " not in output
    again = train(runs.config, 2, f"run.directory={directory}", "checkpoint.every_minutes=1e-6")
    assert again.codes == [0, 0] and "at step 1" in again.output and runs.curve(directory) == runs.reference
    assert again.output.count("checkpoint: wrote") == 7, "a save after each step"


class Clock:
    """Clock in seconds that is set by the test."""

    time = 1000.0

    def __call__(self) -> float:
        return self.time


def make_time_limit(runs, clock: Clock, *overrides: str) -> TimeLimit:
    return TimeLimit(load_run(runs.config, overrides), now=clock, clock=lambda: clock.time + 1e9)


def test_time_limit_leaves_time_for_a_step_and_a_save(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    limit = make_time_limit(runs, clock, "run.time_limit_minutes=10", "checkpoint.before_time_limit_s=100")
    clock.time = 1030.0
    limit.step_ended()
    clock.time = 1050.0
    limit.save_started()
    limit.save_ended(seconds=20.0)
    limit.training_resumed()
    clock.time = 1600.0 - 100.0 - 20.0 - 30.0 - 1.0
    assert not limit.is_up
    clock.time += 1.0
    assert limit.is_up
    assert not make_time_limit(runs, clock).is_up
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(clock.time + 1e9 + 119))
    assert make_time_limit(runs, clock).is_up and make_time_limit(runs, clock, "run.time_limit_minutes=600").is_up
    monkeypatch.setenv("SLURM_JOB_END_TIME", "tomorrow")
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME is 'tomorrow'"):
        make_time_limit(runs, clock)


def test_saves_are_due_every_minutes(runs) -> None:
    clock = Clock()
    limit, never = make_time_limit(runs, clock, "checkpoint.every_minutes=2"), make_time_limit(runs, clock)
    clock.time += 119.0
    assert not limit.save_is_due
    clock.time += 1.0
    assert limit.save_is_due and not never.save_is_due
    limit.save_started()
    assert not limit.save_is_due
    assert TimeLimit.__init__.__kwdefaults__["now"] is time.monotonic, (
        "the clock must be monotonic, or a clock change would delay saves"
    )

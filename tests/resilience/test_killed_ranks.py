"""Killed ranks, launchers and runs: the cause is found, and the run continues from its newest checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from fault_injection import train
from launching import ROOT, lines, start

from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.process import process_status
from megatron_share4v.resilience.exit_analysis import analyze_exit
from megatron_share4v.resilience.rank_state import RankState, read_states, write_state
from megatron_share4v.resilience.supervisor import RestartPolicy, Supervisor, run_directory

T2P2 = (
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "checkpoint.every_steps=1",
    "train.steps=6",
    "schedule.kind=constant",
    "schedule.warmup_steps=1",
)


def test_any_rank_killed_at_any_step(runs) -> None:
    """Kill each rank of tensor 2 x pipeline 2 in turn, at different steps."""
    whole, directory = runs.root / "four", runs.root / "four_killed"
    assert train(runs.config, 4, f"run.directory={whole}", *T2P2).codes == [0] * 4
    for rank, step in enumerate((2, 3, 5, 6)):
        outcome = train(runs.config, 4, f"run.directory={directory}", *T2P2, faults=f"kill:{rank}:{step}")
        assert outcome.codes[rank] == -9 and 0 not in outcome.codes, outcome.output
        after = analyze_exit(directory)
        assert (
            f"killed without an error report (kill -9, out of memory): rank {rank} (" in after.reason
            and after.restart_can_help
        ), after
        assert (after.step, after.of_step) == (step, True) and len(lines(directory / "metrics.jsonl")) == step - 1
    assert train(runs.config, 4, f"run.directory={directory}", *T2P2).codes == [0] * 4
    assert runs.curve(directory) == runs.curve(whole) and analyze_exit(directory).code == 0


def test_ranks_end_with_their_launcher(runs) -> None:
    directory = runs.root / "launcher"
    process = start(
        runs.config,
        2,
        f"run.directory={directory}",
        script=("tests/fault_injection.py", "kill_launcher:0:5,sleep:0:5:100,sleep:1:5:100"),
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == -9, output
    states = read_states(directory / "watch")
    deadline = time.monotonic() + 30.0
    while any(
        (status := process_status(state.pid)) and status[1] == state.born and status[0] != "Z" for state in states
    ):
        assert time.monotonic() < deadline, "ranks outlive torchrun"
        time.sleep(0.1)
    assert len(states) == 2 and "rank 0 (" in analyze_exit(directory).reason
    outcome = train(runs.config, 2, f"run.directory={directory}")
    assert outcome.codes == [0, 0] and "at step 3" in outcome.output and runs.curve(directory) == runs.reference


def test_supervisor_skips_a_step_and_forwards_a_stop(runs) -> None:
    """A step that kills the process twice is skipped; SIGTERM to the supervisor then stops the run with it."""
    directory = runs.root / "supervised"
    command = [
        sys.executable,
        "tests/fault_injection.py",
        "kill:0:5,term_parent:0:7,sleep:0:7:3",
        str(runs.config),
        f"run.directory={directory}",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "tools/supervise.py", "--pause-s", "0", "--", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 75, done.stderr
    assert (
        "step 5 has ended the run twice and is skipped from now on" in done.stderr
        and "stopped: SIGUSR1 on 1 ranks" in done.stderr
    )
    records = lines(directory / "restarts.jsonl")
    assert [(line["attempt"], line["step"], line["newest_checkpoint"], line["again"]) for line in records] == [
        (1, 5, 3, True),
        (2, 5, 3, True),
        (3, 7, 7, False),
    ]
    assert (
        all("killed without an error report" in line["reason"] and line["code"] is None for line in records[:2])
        and records[2]["code"] == 75
    )
    [skipped] = lines(directory / "skip_steps.jsonl")
    assert skipped["step"] == 5 and "ended the run twice" in skipped["reason"]
    assert [line["skipped"] for line in lines(directory / "metrics.jsonl")] == [False] * 4 + [True] + [False] * 2


STATE = RankState(
    rank=0,
    host="h",
    pid=1,
    born=1,
    beat=9,
    step=4,
    phase="compute",
    micro_batch=0,
    since_s=1.0,
    where="",
    collective="",
)


def make_command(run: Path, states: list[RankState], *, code: int, save: int | None = None) -> list[str]:
    """Return a command that writes rank states and exits with `code`.

    With `save` it adds a checkpoint at each start, and exits with 0 after that many.
    """
    states_json = json.dumps([asdict(state) for state in states])
    body = f"""
import json, pathlib, sys
run = pathlib.Path({str(run)!r})
(run / "watch").mkdir(parents=True)
for state in json.loads({states_json!r}):
    (run / "watch" / f"rank{{state['rank']}}.json").write_text(json.dumps(state))
count = len(list(run.glob("checkpoints/*"))) + 1
if {save!r}:
    (run / "checkpoints" / f"step_{{count:08d}}").mkdir(parents=True)
    if count > {save!r}:
        sys.exit(0)
sys.exit({code})
"""
    return [sys.executable, "-c", body]


def test_restarts_are_bounded_without_progress(tmp_path: Path) -> None:
    policy = RestartPolicy(max_restarts=2, pause_s=0.0)
    hopeless = Supervisor(
        make_command(
            tmp_path / "a",
            [STATE, RankState(**asdict(STATE) | {"rank": 1, "ended": "ValueError: x", "code": 1})],
            code=1,
        ),
        tmp_path / "a",
        policy,
    )
    assert hopeless.supervise() == 1
    records = lines(tmp_path / "a" / "restarts.jsonl")
    assert [record["again"] for record in records] == [True, True, False] and all(
        "rank 0 (h, pid 1)" in record["reason"] for record in records
    )
    # A new checkpoint at each start resets the restart count.
    saved = Supervisor(
        make_command(tmp_path / "b", [RankState(**asdict(STATE) | {"phase": "save"})], code=1, save=5),
        tmp_path / "b",
        policy,
    )
    assert saved.supervise() == 0 and len(lines(tmp_path / "b" / "restarts.jsonl")) == 6
    assert not (tmp_path / "b" / "skip_steps.jsonl").exists(), "a failed save does not count against a step"
    silent = Supervisor(
        [sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "c", RestartPolicy(max_restarts=0, pause_s=0.0)
    )
    assert silent.supervise() == 1 and "no rank has started" in lines(tmp_path / "c" / "restarts.jsonl")[0]["reason"]


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (75, 1), (77, 3)])
def test_exit_codes_that_are_not_restarted(tmp_path: Path, code: int, starts: int) -> None:
    ended = RankState(**asdict(STATE) | {"rank": 1, "ended": "SomeError: because", "code": code})
    other = RankState(**asdict(STATE) | {"ended": "RuntimeError: connection closed", "code": 1})
    assert (
        Supervisor(
            make_command(tmp_path / "run", [other, ended], code=1),
            tmp_path / "run",
            RestartPolicy(max_restarts=2, pause_s=0.0),
        ).supervise()
        == code
    )
    records = lines(tmp_path / "run" / "restarts.jsonl")
    assert (
        len(records) == starts and records[0]["reason"] == "rank 1: SomeError: because" and records[0]["code"] == code
    )


def test_follower_restarts_after_the_first_node(tmp_path: Path) -> None:
    """A follower waits for the restart record of the first node, which decides whether to restart."""
    starts, records = tmp_path / "starts", tmp_path / "restarts.jsonl"
    records.write_text('{"again": true, "reason": "of an earlier run", "code": null}\n')
    command = [sys.executable, "-c", f"open({str(starts)!r}, 'a').write('x'); raise SystemExit(1)"]
    seen = []

    def first_node() -> None:
        for number, (again, code) in enumerate(((True, None), (False, 77)), start=1):
            while not (starts.exists() and len(starts.read_text()) == number):
                time.sleep(0.02)
            time.sleep(1.0)
            seen.append(len(starts.read_text()))
            with open(records, "a") as file:
                file.write(json.dumps({"again": again, "reason": "a reason", "code": code}) + "\n")

    node = threading.Thread(target=first_node)
    node.start()
    assert Supervisor(command, tmp_path, RestartPolicy(pause_s=0.0, leads=False)).supervise() == 77
    node.join()
    assert seen == [1, 2] and len(starts.read_text()) == 2 and len(lines(records)) == 3


def test_rank_with_its_own_error_is_the_cause(tmp_path: Path) -> None:
    (tmp_path / "watch").mkdir()
    for rank, error in enumerate(("RuntimeError: Connection closed by peer [127.0.0.1]", "ValueError: x")):
        write_state(tmp_path / "watch", RankState(**asdict(STATE) | {"rank": rank, "ended": error, "code": 1}))
    assert analyze_exit(tmp_path).reason == "rank 1: ValueError: x" and analyze_exit(tmp_path).restart_can_help


def test_rank_with_the_oldest_heartbeat_died_first(tmp_path: Path) -> None:
    """The launcher kills the other ranks seconds after the first has died."""
    for rank, beat in enumerate((20, 12, 20)):
        (tmp_path / "watch").mkdir(exist_ok=True)
        write_state(tmp_path / "watch", RankState(**asdict(STATE) | {"rank": rank, "beat": beat}))
    assert "rank 1 (h, pid 1), at step 4" in analyze_exit(tmp_path).reason


def test_run_directory_of_a_command(runs) -> None:
    command = [
        "torchrun",
        "--nproc-per-node=2",
        "tools/train.py",
        str(runs.config),
        "run.directory=x/y",
        "train.steps=3",
    ]
    assert run_directory(command) == Path("x/y")
    with pytest.raises(ConfigError, match="names no YAML file"):
        run_directory(command[:3])
    with pytest.raises(
        ConfigError, match="no-such-launcher: cannot be started: No such file or directory; check the command after --"
    ):
        Supervisor(["no-such-launcher", *command[1:]], runs.root / "unlaunched", RestartPolicy()).supervise()

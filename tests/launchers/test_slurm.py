"""examples/slurm with a stub of Slurm: environment of each rank, and exit codes that requeue the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import stub_slurm
from launching import lines

# Replaces python: records the environment and arguments of a rank, then exits with CODE or hangs.
RECORDER = """#!/usr/bin/env bash
place="$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
printf '%s %s\\n' "$place" "$*" >>"$STUB_SLURM/ranks.txt"
[ "$RANK" != 1 ] || exit "$CODE"
[ "$HANGING" = 0 ] || exec sleep 60
sleep 0.2
exit "$CODE"
"""


@dataclass(frozen=True)
class JobResult:
    """Exit code and output of a job, recorded rank calls, and whether it was requeued."""

    code: int
    output: str
    ranks: list[str]
    requeued: bool


def submit(
    root: Path,
    script: str,
    *arguments: str,
    code: int = 0,
    hanging: bool = False,
    timeout: float = 60,
    **environment: str,
) -> JobResult:
    """Run an sbatch script as Slurm would, with the variables of its header, in `root`."""
    (root / "calls.txt").write_text("")
    (root / "ranks.txt").write_text("")
    variables = {
        "STUB_SLURM": str(root),
        "STUB_SECOND": "0.02",
        "CODE": str(code),
        "HANGING": str(int(hanging)),
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": "",
        "SLURM_JOB_ID": "77123",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    done = subprocess.run(
        ["bash", f"examples/slurm/{script}.sbatch", *arguments],
        cwd=root,
        env={**os.environ, **variables, **environment},
        text=True,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return JobResult(
        done.returncode,
        done.stdout,
        sorted((root / "ranks.txt").read_text().splitlines()),
        "requeue 77123" in (root / "calls.txt").read_text(),
    )


@pytest.fixture
def root(tmp_path: Path, repository: Path) -> Path:
    for folder in ("examples", "tools"):
        (tmp_path / folder).symlink_to(repository / folder)
    stub_slurm.install(tmp_path / "bin")
    (tmp_path / "bin" / "python").write_text(RECORDER)
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("recipe", ["share4v_7b", "share4v_13b"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_environment_and_arguments_of_each_rank(root: Path, stage: str, recipe: str) -> None:
    result = submit(root, stage, recipe, "train.steps=7")
    assert result.code == 0 and not result.requeued, result.output
    port = 20000 + 77123 % 20000
    places = ["0 4 0 2", "1 4 1 2", "2 4 0 2", "3 4 1 2"]
    commands = ("tools/doctor.py env", "tools/train.py")
    assert result.ranks == [
        f"{place} first {port} {command} examples/{recipe}/{stage}.yaml train.steps=7"
        for place in places
        for command in commands
    ]


@pytest.mark.parametrize(
    ("code", "minutes", "requeued"),
    [(75, "10", True), (138, "10", True), (2, "0", False), (1, "0", True), (1, "10", False)],
)
def test_exit_codes_that_requeue(root: Path, code: int, minutes: str, requeued: bool) -> None:
    """A stopped run is requeued, a user error never, a fault only after `minutes`; each test lasts less than one."""
    result = submit(root, "pretrain", "share4v_7b", code=code, MIN_MINUTES=minutes)
    assert result.requeued == requeued, result.output
    assert requeued or result.code == code
    assert f"started 1 times: ended with exit code {code} after 0 minutes" in result.output


def test_failed_preflight_checks_prevent_training(root: Path) -> None:
    result = submit(root, "finetune", "share4v_7b", code=2)
    assert result.code == 2 and not result.requeued and all("doctor.py" in rank for rank in result.ranks), result.output


def test_hanging_ranks_are_killed_after_one_has_failed(root: Path) -> None:
    result = submit(root, "pretrain", "share4v_7b", code=1, hanging=True, MIN_MINUTES="0", SLURM_RESTART_COUNT="2")
    assert result.requeued and "started 3 times: ended with exit code 137" in result.output


def test_real_run_is_stopped_saved_and_requeued(root: Path, config: Path) -> None:
    """Run tools/doctor.py and tools/train.py on two ranks; send SIGUSR1 as Slurm does before the time limit."""
    (root / "bin" / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    (root / "examples").unlink()
    (root / "examples" / "tiny").mkdir(parents=True)
    (root / "examples" / "slurm").symlink_to(Path(__file__).parents[2] / "examples" / "slurm")
    (root / "examples" / "tiny" / "pretrain.yaml").write_text(config.read_text())
    directory, simple = root / "run", ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false")
    variables = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "STUB_SECOND": "1",
    }
    variables |= {"PYTHONPATH": str(Path(__file__).parents[2]), "VIRTUAL_ENV": str(Path(sys.executable).parents[1])}

    def preempt() -> None:
        while len(lines(directory / "metrics.jsonl")) < 3:
            time.sleep(0.05)
        os.kill(int((root / "srun.pid").read_text()), signal.SIGUSR1)

    threading.Thread(target=preempt, daemon=True).start()
    result = submit(
        root, "pretrain", "tiny", f"run.directory={directory}", "train.steps=20000", *simple, timeout=300, **variables
    )
    assert result.requeued and "ended with exit code 75" in result.output, result.output
    assert (
        "2 ranks on 1 nodes" in result.output
        and "stopped: rank 0: SIGUSR1 on 2 ranks; saved after step" in result.output
    )
    assert (directory / "checkpoints" / "latest").exists()


def test_unknown_recipe_is_refused(root: Path) -> None:
    result = submit(root, "pretrain", "share4v_8b")
    assert result.code == 2 and "examples/share4v_8b/pretrain.yaml not found" in result.output and not result.ranks


def test_sbatch_headers_leave_time_to_save(repository: Path) -> None:
    for stage in ("pretrain", "finetune"):
        text = (repository / "examples" / "slurm" / f"{stage}.sbatch").read_text()
        header = dict(
            line.removeprefix("#SBATCH --").partition("=")[::2]
            for line in text.splitlines()
            if line.startswith("#SBATCH")
        )
        assert header["signal"] == "USR1@300" and "requeue" in header and header["open-mode"] == "append"
        assert header["ntasks-per-node"] == header["gpus-per-node"], json.dumps(header)

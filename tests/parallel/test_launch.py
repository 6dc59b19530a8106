"""Process group start and end: a rank that dies ends the whole job promptly and with its error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import run_world

from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group

# Limit from the start of the last rank to the end of all; far below the timeout of collectives.
PROMPT_S = 15


def test_single_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = World.from_environment()
    assert world == World.single_process()
    with process_group(world, Device("cpu"), timeout_s=60):
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_world_is_read_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert World.from_environment() == World(rank=5, size=8, local_rank=1, local_size=4)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="but not LOCAL_RANK"):
        World.from_environment()


def test_process_group_is_destroyed_after_an_error() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        process_group(World.single_process(), Device("cpu"), timeout_s=60),
    ):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def fail_on_rank_1(directory: Path, how: str) -> None:
    """Fail on rank 1 after a barrier, while the other ranks wait for it in a collective."""
    (directory / str(dist.get_rank())).write_text(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "silently":
            os._exit(9)
        raise RuntimeError("planted error")
    dist.barrier()


def _is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def _assert_all_ended(directory: Path, count: int) -> None:
    """Assert that `count` processes have ended, within PROMPT_S after the last wrote its id into `directory`."""
    files = list(directory.iterdir())
    assert time.time() - max(file.stat().st_mtime for file in files) < PROMPT_S
    processes = [int(file.read_text()) for file in files]
    assert len(processes) == count
    deadline = time.monotonic() + 5
    while any(map(_is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [process for process in processes if _is_running(process)]


@pytest.mark.parametrize(
    ("how", "message"), [("loudly", r"rank 1 failed:(.|\n)*planted error"), ("silently", "rank . (failed|died)")]
)
def test_run_world_ends_with_its_first_dead_rank(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        run_world(3, fail_on_rank_1, tmp_path, how)
    _assert_all_ended(tmp_path, 3)


SCRIPT = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group

world = World.from_environment()
with process_group(world, Device("cpu"), timeout_s=300):
    (Path(sys.argv[1]) / str(world.rank)).write_text(str(os.getpid()))
    dist.barrier()
    if world.rank == 1:
        raise RuntimeError("planted error")
    dist.barrier()
"""


def test_torchrun_ends_with_its_first_dead_rank(tmp_path: Path, repository: Path) -> None:
    script, processes = tmp_path / "script.py", tmp_path / "processes"
    script.write_text(SCRIPT)
    processes.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(processes),
    ]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode != 0
    assert "RuntimeError: planted error" in finished.stderr
    _assert_all_ended(processes, 2)

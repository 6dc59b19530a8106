"""Preflight checks: faults planted on single ranks of one process group, and per-node checks with stubbed readings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from harness import run_world

from megatron_share4v.config.load import load_run
from megatron_share4v.parallel.device import Device
from megatron_share4v.resilience.preflight import node
from megatron_share4v.resilience.preflight.node import (
    GPU_FIELDS,
    check_capacity,
    check_gpu_status,
    check_settings,
    checkpoint_bytes,
)

REMOVED = "tokenizer.model"


@pytest.fixture
def config(tmp_path: Path, repository: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    (tmp_path / REMOVED).write_text("a tokenizer")
    content = {
        "run": {"directory": str(tmp_path / "runs" / "one")},
        "model": {"base": str(repository / "examples" / "models" / "tiny.yaml")},
        "data": {"train": str(tmp_path / "data"), "tokenizer": str(tmp_path / REMOVED), "max_text_length": 200},
        "ops": "reference",
        "train": {"global_batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


def check_with_faults(config: Path, root: Path) -> list:
    """Return (errors, warnings, lines) of several checks: without faults, then with one fault at a time."""
    from megatron_share4v.resilience.preflight import cluster

    rank, run, results = dist.get_rank(), load_run(config), []

    def check(*shared: Path) -> None:
        report = cluster.check_all(run, rank=rank, device=Device("cpu"), shared=shared)
        results.append((report.errors, report.warnings, report.lines))

    cluster.FILE_WAIT_S = 1.0
    cluster.SLOW_FRACTION = 0.0  # the test machine is shared, so speeds vary
    check()
    check(root / f"own{int(rank == 1)}")
    if rank == 2:
        (root / "taken").write_text("a file")
    dist.barrier()
    check(root / "taken" if rank == 2 else root / "free")
    describe_start, cluster.code_hash = cluster.describe_start, lambda package: "0"
    if rank == 1:
        cluster.describe_start = lambda config: {**describe_start(config), "torch": "2.0", "train.steps": "9"}
    check()
    cluster.describe_start = describe_start
    if rank == 0:
        digest, cluster._digest = cluster._digest, lambda path: None if path.name == REMOVED else digest(path)
    if rank == 2:
        other, cluster._digest = (
            cluster._digest,
            lambda path: "other" if path.name == "dataset.json" else other(path),
        )
    check()
    seconds, cluster.SLOW_FRACTION = cluster._time_per_call, 0.1
    cluster._time_per_call = lambda *what, **how: seconds(*what, **how) * (1000 if rank == 1 else 1)
    results.append(cluster._check_speed(["first", "second", "second"], Device("cpu")))
    return results


def test_faults_found_across_ranks(config: Path, tmp_path: Path) -> None:
    first, *rest = run_world(3, check_with_faults, config, tmp_path)
    assert all(mine[:2] == expected[:2] for other in rest for mine, expected in zip(other, first)), (
        "all ranks return the same findings"
    )
    healthy, unshared, unwritable, different, missing, slow = first
    assert healthy[0] == []
    assert "3 ranks on 1 nodes" in healthy[2][0] and any(
        "all-reduce of 4 MB over 3 ranks" in line for line in healthy[2]
    )
    assert [error.split(" (")[0] for error in unshared[0]] == ["rank 0", "rank 1"]
    assert (
        "what ranks 1 wrote there" in unshared[0][0]
        and "does not see in" in unshared[0][1]
        and "what rank 0 wrote there" in unshared[0][1]
    )
    assert (
        len(unwritable[0]) == 1 and unwritable[0][0].startswith("rank 2 (") and "cannot write into" in unwritable[0][0]
    )
    assert (
        len(different[0]) == 2
        and "torch is 2.0 on rank 1 (" in different[0][0]
        and "train.steps is 9 on rank 1" in different[0][1]
    )
    assert "data.tokenizer: there is no" in missing[0][0] and missing[0][0].startswith("rank 0 (")
    assert "is another file here than on most ranks" in missing[0][1] and missing[0][1].startswith("rank 2 (")
    assert slow[1][0].startswith("rank 1 (second): matrix products at")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["data", "run.yaml", "taken", REMOVED], "no files are left behind"


def run_doctor(config: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tools" / "doctor.py"), "env", str(config), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", **environment},
    )


def test_impossible_run_is_one_message_and_exit_code_2(config: Path) -> None:
    done = run_doctor(config, "data.tokenizer=nowhere/tokenizer.model")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert (
        "these machines cannot run the job:\n  this rank: data.tokenizer: there is no nowhere/tokenizer.model here"
        in done.stderr
    )
    alone = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    done = run_doctor(config, "--timeout=2", **alone)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "rank 1 of 2 on" in done.stderr and "could not connect to the others at 127.0.0.1:9 within 2 s" in done.stderr
    )


def make_gpu_status(**changes: str) -> dict[str, str]:
    """Return the nvidia-smi fields of a healthy H100, with changes."""
    return dict(zip(GPU_FIELDS, ("580.95", "1980", "1980", "Not Active", "Not Active", "0", "520"))) | changes


def test_slow_or_damaged_gpus_are_found_in_nvidia_smi() -> None:
    assert list(check_gpu_status(make_gpu_status())) == []
    assert (
        list(
            check_gpu_status(
                make_gpu_status(
                    **{"clocks.applications.graphics": "[N/A]", "ecc.errors.uncorrected.volatile.total": "[N/A]"}
                )
            )
        )
        == []
    )
    [finding] = check_gpu_status(make_gpu_status(**{"clocks.applications.graphics": "1200"}))
    assert finding.level == "warning" and "1200 of 1980 MHz" in finding.text
    [finding] = check_gpu_status(make_gpu_status(**{"clocks_throttle_reasons.sw_thermal_slowdown": "Active"}))
    assert finding.level == "warning" and "sw_thermal_slowdown" in finding.text
    [finding] = check_gpu_status(make_gpu_status(**{"ecc.errors.uncorrected.volatile.total": "3"}))
    assert finding.level == "error" and "3 uncorrected" in finding.text
    [finding] = check_gpu_status({})
    assert "nvidia-smi does not respond" in finding.text


def test_slow_nccl_settings_are_named() -> None:
    [finding] = check_settings({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0", "LD_BIND_NOW": ""})
    assert finding.text == "NCCL_P2P_DISABLE=1 is set: the GPUs of a node do not use NVLink"


def test_disk_space_for_checkpoints(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(config)
    one = checkpoint_bytes(run)
    usage = namedtuple("usage", "free")
    for free, level in ((10 * one, None), (2 * one, "warning"), (one - 1, "error")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free))
        found = [finding.level for finding in check_capacity(run) if "checkpoint" in finding.text]
        assert found == ([level] if level else [])


def test_checkpoint_size_estimate(repository: Path) -> None:
    """ShareGPT4V-7B, stage 2: 7.06 billion weights, of which 6.76 billion are trained."""
    gigabytes = checkpoint_bytes(load_run(repository / "examples" / "share4v_7b" / "finetune.yaml")) / 1e9
    assert abs(gigabytes - (2 * 7.06 + 12 * 6.76)) < 2


def test_gpu_with_a_cpu_build_of_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.Path, "glob", lambda self, pattern: [Path("/dev/nvidia0")])
    [finding] = node.check_device(Device("cpu"), local_size=1)
    assert finding.level == "error" and "built without CUDA" in finding.text

"""Facts about a run for its run card (observability/run_card.py): code, versions, machine, data, start weights."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

import megatron_share4v
from megatron_share4v.checkpoint.manifest import library_versions, read_manifest
from megatron_share4v.checkpoint.store import resolve_checkpoint
from megatron_share4v.config.load import dump
from megatron_share4v.data.sampling.blend import source_rows
from megatron_share4v.data.sampling.fingerprint import describe_data
from megatron_share4v.errors import CheckpointError
from megatron_share4v.observability.records import read_object
from megatron_share4v.resilience.preflight.consistency import code_hash
from megatron_share4v.train.build import Training

DECISIONS = ("ops.json", "attention.json", "image_backend.json")
"""Files written by train/backend_records.py."""


def describe_start(training: Training, hosts: Sequence[str]) -> dict[str, Any]:
    """Describe this start of the run; `hosts` has the host name of each rank."""
    return {
        "after_step": training.start_step,
        "layout": str(training.mesh.layout),
        "ranks": len(hosts),
        "nodes": len(set(hosts)),
    }


def collect_run_facts(training: Training, hosts: Sequence[str]) -> dict[str, Any]:
    """Collect the sections of the run card that are known before the first step."""
    directory, source = training.directory, training.source
    sources = {share.name: {"samples": share.count, "epochs": share.epochs} for share in source_rows(source.index)}
    decisions = {Path(name).stem: read_object(directory / name) for name in DECISIONS if (directory / name).exists()}
    return {
        "versions": list_versions(),
        "code": describe_code(),
        "layout": str(training.mesh.layout),
        "machine": {
            "device": training.mesh.device.describe(),
            "nodes": dict(Counter(hosts)),
            "cores": psutil.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(),
        },
        "decisions": decisions,
        "start_weights": describe_start_weights(training),
        "data": {
            "plan": source.sampler.fingerprint,
            **describe_data(source.sampler, source.encoder),
            "sources": sources,
        },
        "total_steps": training.total_steps,
        "configuration": yaml.safe_load(dump(training.config)),
    }


def list_versions() -> dict[str, str]:
    """List the versions of Python, the libraries and, on CUDA builds, CUDA, NCCL and cuDNN."""
    versions = {"python": platform.python_version(), **library_versions(), "torch build": torch.__version__}
    if torch.version.cuda is not None:
        versions |= {
            "CUDA": torch.version.cuda,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return versions


def describe_code() -> dict[str, str]:
    """Return the hash of the package's sources and, in a checkout, its commit and the files that differ from it."""
    package = Path(megatron_share4v.__file__).parent
    code = {"sources": code_hash(package)}
    if (package.parent / ".git").exists():
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        code["commit"] = _git(package, "rev-parse", "HEAD")
        code["changed"] = ", ".join(line[3:] for line in changed.splitlines()) or "nothing"
    return code


def describe_start_weights(training: Training) -> dict[str, Any]:
    """Describe where the first weights came from; `contents` is a SHA-256 over the file hashes of that checkpoint."""
    start = training.config.checkpoint.initialize_from
    if start is None:
        return {"from": f"random, seed {training.config.run.seed}"}
    try:
        path = resolve_checkpoint(Path(start))
        manifest = read_manifest(path)
    except CheckpointError as error:  # a resumed run does not need it any more
        return {"from": start, "now": str(error)}
    files = "".join(f"{name} {file.sha256}\n" for name, file in sorted(manifest.files.items()))
    return {
        "from": str(path),
        "contents": hashlib.sha256(files.encode()).hexdigest(),
        "step": manifest.state.step,
        **manifest.weights,
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60, check=True
        ).stdout.rstrip()
    except (OSError, subprocess.SubprocessError) as problem:
        return f"unknown ({problem})"

"""run_card.json and run_card.md: all that a number of this run depends on, and the numbers, in one place that outlives the machines.

Written by rank 0 when training begins and again when it ends, however it ends; a process that is killed leaves the card of its start, whose status is
"running". Each start adds a line to `starts`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
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
from megatron_share4v.logging import get_logger
from megatron_share4v.observability.goodput import ACCOUNTS
from megatron_share4v.observability.records import read_lines, read_object
from megatron_share4v.observability.writers import METRICS
from megatron_share4v.parallel.collectives import gather_objects
from megatron_share4v.resilience.preflight.consistency import code_hash
from megatron_share4v.train.build import Training

FILE = "run_card.json"
CURVE_POINTS = 12
DECISIONS = ("ops.json", "attention.json", "image_backend.json")
"""What backend_report.py has written beside it."""


class RunCard:
    """The card of one start. Every rank has one; rank 0's is written."""

    def __init__(self, training: Training) -> None:
        """Write the card of the start. Collective."""
        hosts = gather_objects(socket.gethostname())
        self._metrics, self._path = training.directory / METRICS, training.directory / FILE
        self._card: dict[str, Any] | None = None
        if training.mesh.rank == 0:
            self._card = start_card(training, hosts=hosts, before=read_object(self._path))
            write_card(self._path, self._card | {"status": "running"})

    def end(self, status: str) -> None:
        """Write how it ended, with the figures. A full disk keeps nobody from ending."""
        if self._card is None:
            return
        try:
            write_card(self._path, self._card | {"status": status, "ended": _now(), "figures": figures(self._metrics)})
        except OSError as problem:
            get_logger().warning("the run card could not be written: %s", problem)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """What leaves the block as an error is how the run ended."""
        try:
            yield
        except BaseException as error:
            self.end(f"failed: {type(error).__name__}: {error}")
            raise


def start_card(training: Training, *, hosts: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before the first step. `before`: the card of an earlier start, or nothing."""
    directory = training.directory
    start = {
        "time": _now(),
        "after_step": training.start_step,
        "layout": str(training.mesh.layout),
        "ranks": len(hosts),
        "nodes": len(set(hosts)),
    }
    source = training.source
    return {
        "run": str(directory.absolute()),
        "starts": [*(starts if isinstance(starts := before.get("starts"), list) else []), start],
        "versions": versions(),
        "code": code(),
        "layout": str(training.mesh.layout),
        "machine": machine(training, hosts),
        "decisions": {
            Path(name).stem: read_object(directory / name) for name in DECISIONS if (directory / name).exists()
        },
        "start_weights": start_weights(training),
        "data": {
            "plan": source.plan.fingerprint,
            **describe_data(source.plan, source.encoder),
            "sources": {
                share.name: {"samples": share.count, "epochs": share.epochs} for share in source_rows(source.index)
            },
        },
        "total_steps": training.total_steps,
        "configuration": yaml.safe_load(dump(training.config)),
        "figures": figures(directory / METRICS),
    }


def versions() -> dict[str, str]:
    """Of everything that computes."""
    found = {"python": platform.python_version(), **library_versions(), "torch build": torch.__version__}
    if torch.version.cuda is not None:
        found |= {
            "CUDA": torch.version.cuda,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return found


def code() -> dict[str, str]:
    """The hash of the package's sources, and in a checkout its commit and whether files differ from it."""
    package = Path(megatron_share4v.__file__).parent
    found = {"sources": code_hash(package)}
    if (package.parent / ".git").exists():
        found |= {"commit": _git(package, "rev-parse", "HEAD")}
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        found |= {"changed": ", ".join(line[3:] for line in changed.splitlines()) or "nothing"}
    return found


def machine(training: Training, hosts: Sequence[str]) -> dict[str, Any]:
    """What it ran on, as rank 0 sees it."""
    return {
        "device": training.mesh.device.describe(),
        "nodes": dict(Counter(hosts)),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def start_weights(training: Training) -> dict[str, Any]:
    """Where the first step's weights came from. contents: SHA-256 over the hashes of all files of that checkpoint, which its manifest has."""
    start = training.config.checkpoint.initialize_from
    if start is None:
        return {"from": f"random, seed {training.config.run.seed}"}
    try:
        path = resolve_checkpoint(Path(start))
        manifest = read_manifest(path)
    except CheckpointError as gone:  # a run that resumes does without
        return {"from": start, "now": str(gone)}
    files = "".join(f"{name} {file.sha256}\n" for name, file in sorted(manifest.files.items()))
    return {
        "from": str(path),
        "contents": hashlib.sha256(files.encode()).hexdigest(),
        "step": manifest.state.step,
        **manifest.weights,
    }


def figures(metrics: Path) -> dict[str, Any]:
    """The run in numbers, of all its starts, from metrics.jsonl; rates are medians over the steps."""
    lines = read_lines(metrics, "loss", "consumed_samples", "tokens", "peak_memory_bytes", "skipped")
    if not lines:
        return {"steps": 0}
    last, validated = lines[-1], [line for line in lines if line.get("validation_loss") is not None]
    picked = sorted({round(index * (len(lines) - 1) / (CURVE_POINTS - 1)) for index in range(CURVE_POINTS)})
    rates = {
        name: [line[name] for line in lines if line.get(name) is not None]
        for name in ("tokens_per_s_per_gpu", "mfu", "hfu", "step_time_s")
    }
    seconds = {name.removesuffix("_s"): round(sum(line.get(name, 0.0) for line in lines), 3) for name in ACCOUNTS}
    return {
        "steps": last["step"],
        "loss": {str(lines[index]["step"]): lines[index]["loss"] for index in picked},
        "validation_loss": {str(line["step"]): line["validation_loss"] for line in validated[-3:]},
        "consumed_samples": last["consumed_samples"],
        "tokens": sum(line["tokens"] for line in lines),
        **{name: statistics.median(values) for name, values in rates.items() if values},
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        "skipped_steps": [line["step"] for line in lines if line["skipped"]],
        "faulty_samples": sum(line.get("faulty_samples", 0) for line in lines),
        "seconds": seconds,
        "goodput": last.get("goodput"),
    }


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Both files, each whole or not at all."""
    for target, text in (
        (path, json.dumps(card, indent=1, ensure_ascii=False)),
        (path.with_suffix(".md"), as_markdown(card)),
    ):
        temporary = target.with_name(f".{target.name}")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, target)


def as_markdown(card: Mapping[str, Any]) -> str:
    """For people: the status and the figures first, the whole configuration last."""
    lines = [
        f"# {Path(card['run']).name}",
        "",
        f"{card['status']} ({card.get('ended') or card['starts'][-1]['time']})",
        "",
    ]
    for name in ("figures", "starts", "start_weights", "data", "layout", "machine", "decisions", "versions", "code"):
        lines += [f"## {name.replace('_', ' ')}", "", *_items(card[name]), ""]
    return "\n".join(
        [
            *lines,
            "## configuration",
            "",
            "```yaml",
            yaml.safe_dump(card["configuration"], sort_keys=False).strip(),
            "```",
        ]
    )


def _items(value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"- {', '.join(f'{key} {part}' for key, part in entry.items())}" for entry in value]
    if not isinstance(value, Mapping):
        return [str(value)]
    lines = []
    for key, part in value.items():
        text = (
            ", ".join(f"{name} {_brief(inner)}" for name, inner in part.items())
            if isinstance(part, Mapping)
            else _brief(part)
        )
        lines.append(f"- {key}: {text}")
    return lines


def _brief(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as problem:
        return f"unknown ({problem})"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

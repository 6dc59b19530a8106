"""Run card: everything a number of this run depends on, and the numbers, as run_card.json and run_card.md.

Rank 0 writes it when training begins and again when it ends, with or without an error; a killed process leaves the card
of its start, with status "running". Each start adds an entry to `starts`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_share4v.files import atomic_write_text
from megatron_share4v.logging import get_logger
from megatron_share4v.observability.goodput import ACCOUNTS
from megatron_share4v.observability.records import read_lines, read_object
from megatron_share4v.observability.writers import METRICS

FILE = "run_card.json"
CURVE_POINTS = 12


class RunCard:
    """The card of one start of a run, written on construction."""

    def __init__(self, directory: Path, *, start: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """start: the entry of this start without its time; facts: the other sections (train/run_facts.py)."""
        self._path, self._metrics = directory / FILE, directory / METRICS
        starts = read_object(self._path).get("starts")
        self._card = {
            "run": str(directory.absolute()),
            "starts": [*(starts if isinstance(starts, list) else []), {"time": _now()} | dict(start)],
            **facts,
        }
        write_card(self._path, self._card | {"figures": summarise_metrics(self._metrics), "status": "running"})

    def end(self, status: str) -> None:
        """Write the card with the final status and figures. A full disk only causes a warning."""
        final = {"figures": summarise_metrics(self._metrics), "status": status, "ended": _now()}
        try:
            write_card(self._path, self._card | final)
        except OSError as problem:
            get_logger().warning("the run card could not be written: %s", problem)


def summarise_metrics(metrics: Path) -> dict[str, Any]:
    """Summarise metrics.jsonl over all starts of the run; rates are medians over the steps."""
    lines = read_lines(metrics, "loss", "consumed_samples", "tokens", "peak_memory_bytes", "skipped")
    if not lines:
        return {"steps": 0}
    last, validated = lines[-1], [line for line in lines if line.get("validation_loss") is not None]
    spacing = (len(lines) - 1) / (CURVE_POINTS - 1)
    curve = sorted({round(point * spacing) for point in range(CURVE_POINTS)})
    rates = {
        name: [line[name] for line in lines if line.get(name) is not None]
        for name in ("tokens_per_s_per_gpu", "mfu", "hfu", "step_time_s")
    }
    seconds = {name.removesuffix("_s"): round(sum(line.get(name, 0.0) for line in lines), 3) for name in ACCOUNTS}
    return {
        "steps": last["step"],
        "loss": {str(lines[index]["step"]): lines[index]["loss"] for index in curve},
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
    """Write the JSON file at `path` and the Markdown file beside it, each atomically."""
    atomic_write_text(path, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    atomic_write_text(path.with_suffix(".md"), format_markdown(card) + "\n")


def format_markdown(card: Mapping[str, Any]) -> str:
    """Format a card as Markdown: status and figures first, the configuration last."""
    ended = card.get("ended") or card["starts"][-1]["time"]
    lines = [f"# {Path(card['run']).name}", "", f"{card['status']} ({ended})", ""]
    for name in ("figures", "starts", "start_weights", "data", "layout", "machine", "decisions", "versions", "code"):
        lines += [f"## {name.replace('_', ' ')}", "", *_format_section(card[name]), ""]
    configuration = yaml.safe_dump(card["configuration"], sort_keys=False).strip()
    return "\n".join([*lines, "## configuration", "", "```yaml", configuration, "```"])


def _format_section(value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"- {', '.join(f'{key} {part}' for key, part in entry.items())}" for entry in value]
    if not isinstance(value, Mapping):
        return [str(value)]
    lines = []
    for key, part in value.items():
        text = (
            ", ".join(f"{name} {_format_value(inner)}" for name, inner in part.items())
            if isinstance(part, Mapping)
            else _format_value(part)
        )
        lines.append(f"- {key}: {text}")
    return lines


def _format_value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Tolerant readers of the files that earlier starts of a run have written beside its checkpoints.

A run can resume without them, so a line that is cut off by a kill or a full disk, or edited wrongly, is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_share4v.files import read_text
from megatron_share4v.logging import get_logger


def read_lines(path: Path, *fields: str) -> list[dict[str, Any]]:
    """Read the lines of a JSONL file that are records of a step with all these fields; [] when there is no file."""
    return [record for line in split_lines(path) if (record := parse_line(line, *fields)) is not None]


def split_lines(path: Path) -> list[str]:
    """Read the lines of a file with their line ends; bytes that are not UTF-8 become replacement characters."""
    return read_text(path, errors="replace").splitlines(keepends=True) if path.exists() else []


def parse_line(line: str, *fields: str) -> dict[str, Any] | None:
    """Parse a record of a step; None for a partial line and for a line without all these fields."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record if record.keys() >= set(fields) else None


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; {} when there is no file and, with a warning, when it holds no object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(read_text(path, errors="replace"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        get_logger().warning("%s cannot be read, and is written anew", path)
        return {}
    return content

"""Reading what earlier starts of a run have written beside its checkpoints. None of it is needed to go on, so nothing in it keeps a run from going on:
a line cut off by a kill or a full disk, or spoiled by hand, is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_share4v.logging import get_logger


def read_lines(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are objects of a step with all these fields; none where there is no file."""
    return [record for line in split_lines(path) if (record := parse_line(line, *fields)) is not None]


def split_lines(path: Path) -> list[str]:
    """With their ends; bytes that are no text become marks."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []


def parse_line(line: str, *fields: str) -> dict[str, Any] | None:
    """None: it is cut off, or no object of a step with all these fields."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return (
        record
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record.keys() >= set(fields)
        else None
    )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty, with a warning, where it holds none, and where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        get_logger().warning("%s cannot be read, and is written anew", path)
        return {}
    return content

"""The list of steps to skip, skip_steps.jsonl: no data of a listed step is read and no update is made.

Steps are added by a rollback (resilience/rollback.py), by the supervisor for a step that ended the run twice
(resilience/supervisor.py), or by hand. One object per line: {"step": 7, "reason": "..."}; steps are 1-based, as in
metrics.jsonl. The supervisor imports this module, so torch is imported only in the collective function.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_share4v.errors import DataError
from megatron_share4v.files import append_json_lines, read_text
from megatron_share4v.logging import get_logger

FILE = "skip_steps.jsonl"


def read_skip_steps(directory: Path) -> dict[int, str]:
    """Read the list as step -> reason, empty when there is no file; DataError names a line that cannot be read."""
    path = directory / FILE
    reasons: dict[int, str] = {}
    lines = read_text(path, errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            reasons[int(entry["step"])] = str(entry["reason"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}:{number}: {line!r} is not like {{"step": 7, "reason": "..."}} ({error!r}); '
                "correct or remove the line"
            ) from error
    return reasons


def add_skip_steps(directory: Path, steps: Iterable[int], *, reason: str) -> None:
    """Append `steps` to the list with one reason. Call on one rank only."""
    with open(directory / FILE, "ab") as file:
        append_json_lines(file, ({"step": step, "reason": reason} for step in steps))


def share_skip_steps(directory: Path, *, after: int) -> dict[int, str]:
    """Read the list on rank 0 and return it on all ranks; log the steps beyond `after`. Collective."""
    from megatron_share4v.parallel.collectives import run_on_rank0

    reasons = run_on_rank0(lambda: read_skip_steps(directory))
    ahead = [f"{step} ({reason})" for step, reason in sorted(reasons.items()) if step > after]
    if ahead:
        get_logger().warning("steps that will be skipped, listed in %s: %s", directory / FILE, "; ".join(ahead))
    return reasons

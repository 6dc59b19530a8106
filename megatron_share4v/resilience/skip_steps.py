"""skip_steps.jsonl in a run directory: the quarantine list of steps. A step in it is passed over when it is played again: nothing of it is read or trained.

Who puts a step there: a rollback (train/rollback.py), the supervisor for a step that ended the run twice (resilience/supervisor.py), or a person. One
object per line: {"step": 7, "reason": "..."}; steps count from 1, as in metrics.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_share4v.errors import DataError

FILE = "skip_steps.jsonl"


def read_skips(directory: Path) -> dict[int, str]:
    """Step -> reason; empty where there is no list. Raises DataError that names the line which is no such object."""
    path, found = directory / FILE, {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found[int(entry["step"])] = str(entry["reason"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}:{number}: {line!r} is not like {{"step": 7, "reason": "..."}} ({error!r}); correct or remove the line'
            ) from error
    return found


def add_skips(directory: Path, steps: Iterable[int], *, reason: str) -> None:
    """Put `steps` on the list, for one reason. Run it on one rank."""
    with open(directory / FILE, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "reason": reason}) + "\n" for step in steps)

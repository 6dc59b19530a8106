"""The directories of a run's checkpoints: their names, what a killed process left behind, and which of them may go.

A directory appears under its name only when it is whole, and disappears from it before its files do: whatever is being written or
removed has a name that starts with a dot.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

from megatron_share4v.checkpoint.manifest import fsync_directory, verify_files
from megatron_share4v.errors import CheckpointError
from megatron_share4v.logging import get_logger

_NAME = re.compile(r"step_(\d{8,})")
_WRITING, _REMOVING, _DAMAGED = ".writing", ".removing", ".damaged"


def step_directory_name(step: int) -> str:
    """The directory of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """Published checkpoints by step, oldest first; none when `directory` does not exist."""
    if not directory.is_dir():
        return {}
    found = {
        int(match[1]): path for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def is_complete(checkpoint: Path) -> bool:
    """Whether every file is there with its size."""
    try:
        verify_files(checkpoint, contents=False)
    except CheckpointError:
        return False
    return True


def create_staging_directory(target: Path) -> Path:
    """An empty directory beside `target`, in which a checkpoint can be made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}{_WRITING}")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, target: Path) -> None:
    """Give a finished directory its name; what bore it before is replaced."""
    if target.exists():
        get_logger().warning("checkpoint: %s is replaced by a new save of the same step", target)
        replaced = _hidden(target)
        os.rename(temporary, target)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, target)
    fsync_directory(target.parent)


def mark_damaged(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name under which nobody takes it for one, beside the others; the new path."""
    target = checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}")
    for number in itertools.count(2):
        if not target.exists():
            break
        target = checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}_{number}")
    os.rename(checkpoint, target)
    fsync_directory(checkpoint.parent)
    get_logger().warning(
        "checkpoint: set %s aside as %s; remove it when it has been looked at", checkpoint, target.name
    )
    return target


def remove_incomplete(directory: Path) -> list[Path]:
    """Remove what killed processes were writing or removing in `directory`, and say so. No other process may be writing there."""
    found = sorted(path for suffix in (_WRITING, _REMOVING) for path in directory.glob(f".*{suffix}"))
    for path in found:
        shutil.rmtree(path)
        get_logger().warning(
            "checkpoint: removed %s, left behind by a process that was ended in the middle of it", path
        )
    return found


def remove_old_checkpoints(directory: Path, *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Remove checkpoints older than the `keep_last` newest whole ones, except those at multiples of `keep_every_steps` (0: no exception).

    Nothing is removed while there are fewer whole ones than that. Run it on one rank, after a save.
    """
    assert keep_last > 0, keep_last
    checkpoints = list_checkpoints(directory)
    whole = [step for step, path in checkpoints.items() if is_complete(path)]
    if len(whole) < keep_last:
        return []
    old = [
        path
        for step, path in checkpoints.items()
        if step < whole[-keep_last] and not (keep_every_steps and step % keep_every_steps == 0)
    ]
    for path in old:
        shutil.rmtree(_hidden(path))
        get_logger().info("checkpoint: removed %s (checkpoint.keep_last %d)", path, keep_last)
    return old


def prune_checkpoints(directory: Path, *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """`remove_old` for a user: of a run directory or its checkpoints/. Raises CheckpointError when nothing would be kept, or nothing is there."""
    if keep_last < 1:
        raise CheckpointError(f"--keep-last {keep_last}: at least the newest checkpoint is kept; give 1 or more")
    found = next((path for path in (directory, directory / "checkpoints") if list_checkpoints(path)), None)
    if found is None:
        raise CheckpointError(f"{directory}: holds no checkpoints; give a run directory")
    return remove_old_checkpoints(found, keep_last=keep_last, keep_every_steps=keep_every_steps)


def _hidden(target: Path) -> Path:
    hidden = target.with_name(f".{target.name}{_REMOVING}")
    os.rename(target, hidden)
    return hidden

"""Checkpoint directories of a run: names, atomic publishing, leftovers of killed processes, and removal of old
checkpoints.

A directory gets its name only when it is complete, and loses it before its files are removed: while it is written or
removed, its name starts with a dot.
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
    """Return the directory name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """Return the published checkpoints by step, oldest first; empty when `directory` does not exist."""
    if not directory.is_dir():
        return {}
    found = {
        int(match[1]): path for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file of the manifest exists with its size."""
    try:
        verify_files(checkpoint, contents=False)
    except CheckpointError:
        return False
    return True


def create_staging_directory(target: Path) -> Path:
    """Create an empty hidden directory beside `target`, in which a checkpoint is written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}{_WRITING}")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished directory to `target`, replacing a checkpoint of that name."""
    if target.exists():
        get_logger().warning("checkpoint: %s is replaced by a new save of the same step", target)
        replaced = _hide(target)
        os.rename(temporary, target)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, target)
    fsync_directory(target.parent)


def mark_damaged(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer listed as one; return the new path."""
    target = checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}")
    for number in itertools.count(2):
        if not target.exists():
            break
        target = checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}_{number}")
    os.rename(checkpoint, target)
    fsync_directory(checkpoint.parent)
    get_logger().warning(
        "checkpoint: renamed the damaged %s to %s; remove it after inspection", checkpoint, target.name
    )
    return target


def remove_incomplete(directory: Path) -> list[Path]:
    """Remove directories that killed processes were writing or removing, and log each.

    No other process may be writing in `directory`.
    """
    found = sorted(path for suffix in (_WRITING, _REMOVING) for path in directory.glob(f".*{suffix}"))
    for path in found:
        shutil.rmtree(path)
        get_logger().warning(
            "checkpoint: removed %s, left behind by a process that was killed while writing or removing it", path
        )
    return found


def remove_old_checkpoints(directory: Path, *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Remove checkpoints older than the `keep_last` newest complete ones, except at multiples of `keep_every_steps` (0:
    none).

    Nothing is removed while fewer than `keep_last` are complete. Call it on one rank, after a save.
    """
    assert keep_last > 0, keep_last
    checkpoints = list_checkpoints(directory)
    complete = [step for step, path in checkpoints.items() if is_complete(path)]
    if len(complete) < keep_last:
        return []
    old = [
        path
        for step, path in checkpoints.items()
        if step < complete[-keep_last] and not (keep_every_steps and step % keep_every_steps == 0)
    ]
    for path in old:
        shutil.rmtree(_hide(path))
        get_logger().info("checkpoint: removed %s (checkpoint.keep_last %d)", path, keep_last)
    return old


def prune_checkpoints(directory: Path, *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Remove old checkpoints of a run directory or its checkpoints/ on a user's request (see `remove_old_checkpoints`).

    Raises CheckpointError when `keep_last` is below 1 or there are no checkpoints.
    """
    if keep_last < 1:
        raise CheckpointError(f"--keep-last {keep_last}: at least the newest checkpoint is kept; give 1 or more")
    found = next((path for path in (directory, directory / "checkpoints") if list_checkpoints(path)), None)
    if found is None:
        raise CheckpointError(f"{directory}: holds no checkpoints; give a run directory")
    return remove_old_checkpoints(found, keep_last=keep_last, keep_every_steps=keep_every_steps)


def _hide(target: Path) -> Path:
    """Rename a checkpoint to its hidden name for removal; return the new path."""
    hidden = target.with_name(f".{target.name}{_REMOVING}")
    os.rename(target, hidden)
    return hidden

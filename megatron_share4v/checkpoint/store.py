"""Saving and loading a run: all ranks together write or read one directory, rank 0 alone checks and publishes it.

`<run>/checkpoints/step_00000010/` holds the tensors (mcore/dist_checkpoint.py) and manifest.json; `<run>/checkpoints/latest` names the
newest. Every function that takes a mesh is collective, and an error that one rank finds is raised on all.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, hash_components
from megatron_share4v.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    RunState,
    fsync_directory,
    hash_files,
    library_versions,
    verify_files,
    write_manifest,
)
from megatron_share4v.checkpoint.retention import (
    create_staging_directory,
    list_checkpoints,
    mark_damaged,
    publish,
    remove_incomplete,
    step_directory_name,
)
from megatron_share4v.errors import CheckpointError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.async_writer import HostBuffers
from megatron_share4v.mcore.dist_checkpoint import count_updates, load_sharded, take_snapshot
from megatron_share4v.mcore.dist_checkpoint_files import stored_tensors
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import MegatronOptimizer
from megatron_share4v.model.initialize import SHARDING
from megatron_share4v.parallel.collectives import run_on_rank0

__all__ = [
    "FinishSave",
    "RunState",
    "find_latest_complete",
    "load_checkpoint",
    "load_weights",
    "resolve_and_read_manifest",
    "resolve_checkpoint",
    "save_checkpoint",
    "start_save",
    "write_checkpoint",
]

LATEST = "latest"
CHECKPOINTS = "checkpoints"
T = TypeVar("T")
FinishSave = Callable[[dist.ProcessGroup | None], Path]
"""Writes what was taken, over a group of all ranks (None: the default one), and gives the checkpoint's directory. Collective."""


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    state: RunState,
    config_text: str,
    assets: Sequence[Path] = (),
) -> Path:
    """Write `directory`/step_<step> and name it in `directory`/latest. Leftovers of a killed save are removed first.

    `config_text` is the run's whole configuration; `assets` are files that are copied in (checkpoint/assets.py). Returns
    the new directory. Raises CheckpointError when it cannot be written; what was there before is then untouched.
    """
    return start_save(
        directory,
        step=step,
        chunks=chunks,
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        config_text=config_text,
        assets=assets,
    )(None)


def start_save(
    directory: Path,
    *,
    step: int,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    state: RunState,
    config_text: str,
    assets: Sequence[Path] = (),
    buffers: HostBuffers | None = None,
) -> FinishSave:
    """`save` in two: what is to be written is taken now, and the result writes and names it. With `buffers`, a thread may do so while training goes on.

    One save must be complete before the next one begins.
    """
    assert state.step == step, (state, step)
    directory = Path(directory)
    target = directory / step_directory_name(step)
    complete = _begin(
        target,
        chunks=chunks,
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        config_text=config_text,
        assets=assets,
        buffers=buffers,
    )

    def named(group: dist.ProcessGroup | None) -> Path:
        complete(group)
        run_on_rank0(lambda: _name_latest(directory, target.name), group=group)
        return target

    return named


def write_checkpoint(
    target: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    state: RunState,
    config_text: str,
    assets: Sequence[Path] = (),
) -> None:
    """Write the checkpoint `target`: complete under that name, or not there. `optimizer` None: weights alone."""
    _begin(
        target,
        chunks=chunks,
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        config_text=config_text,
        assets=assets,
    )(None)


def _begin(
    target: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    state: RunState,
    config_text: str,
    assets: Sequence[Path],
    buffers: HostBuffers | None = None,
) -> FinishSave:
    started = time.perf_counter()
    temporary = run_on_rank0(lambda: _prepare(target))
    updates = None if optimizer is None else count_updates(optimizer)
    snapshot = take_snapshot(temporary, chunks=chunks, optimizer=optimizer, sharding=SHARDING, buffers=buffers)

    def finish() -> tuple[int, str]:
        for path in assets:
            shutil.copyfile(path, temporary / path.name)
        files = hash_files(temporary)
        versions, weights = library_versions(), _tower_hash(temporary)
        manifest = Manifest(
            state=state,
            updates=updates,
            layout=mesh.layout,
            config=config_text,
            versions=versions,
            weights=weights,
            files=files,
        )
        write_manifest(temporary, manifest)
        publish(temporary, target)
        return manifest.size, weights.get("vision", "none")

    def complete(group: dist.ProcessGroup | None) -> Path:
        snapshot.write(group)
        size, tower = run_on_rank0(finish, group=group)
        get_logger().info(
            "checkpoint: wrote %s, %.3f GB in %.1f s; tower sha256 %s",
            target,
            size / 1e9,
            time.perf_counter() - started,
            tower,
        )
        return target

    return complete


def load_checkpoint(
    path: Path, *, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, mesh: Mesh, verified: bool = False
) -> RunState:
    """Weights and optimizer state of the checkpoint `path` (see `locate`), in place; the state of the run that wrote it.

    The layout may differ from the one it was written at. `verified`: find_newest_whole has just read every byte, do not do it again.
    Raises CheckpointError when it is damaged, holds no optimizer state, or belongs to another model or other trained parts.
    """
    started = time.perf_counter()
    checkpoint, manifest = _opened(path, mesh=mesh, contents=not verified)
    if manifest.updates is None:
        raise CheckpointError(
            f"{checkpoint}: holds weights alone, nothing to resume; start a run from it with checkpoint.initialize_from"
        )
    load_sharded(checkpoint, chunks=chunks, optimizer=optimizer, updates=manifest.updates, sharding=SHARDING)
    _report("loaded", checkpoint, manifest, started)
    return manifest.state


def load_weights(path: Path, *, chunks: Sequence[torch.nn.Module], mesh: Mesh) -> Manifest:
    """Weights alone, in place, whatever parts were trained; the manifest of the checkpoint `path` (see `locate`).

    Call it before build_optimizer, which copies the weights that it finds. Raises CheckpointError as `load` does.
    """
    started = time.perf_counter()
    checkpoint, manifest = _opened(path, mesh=mesh, contents=True)
    load_sharded(checkpoint, chunks=chunks, optimizer=None, updates=0, sharding=SHARDING)
    _report("loaded the weights of", checkpoint, manifest, started)
    return manifest


def resolve_and_read_manifest(path: Path, *, mesh: Mesh) -> tuple[Path, Manifest]:
    """Which checkpoint `path` means, and its manifest, for a look before `load_weights`; of its files only presence and sizes are compared."""
    return _opened(path, mesh=mesh, contents=False)


def find_latest_complete(directory: Path, *, mesh: Mesh | None = None) -> Path | None:
    """The newest checkpoint in `directory` that is whole; those passed over are named in the log with the reason. None: there is none.

    With a mesh: for a run that resumes. Rank 0 removes leftovers of a killed save, reads every byte, sets damaged ones aside and tells the others.
    Raises CheckpointError when there are checkpoints but none is whole: a run does not start anew over them by itself.
    Without: for a reader beside it. Any process may call it; presence and sizes of the files are compared alone.
    """
    directory = Path(directory)
    if mesh is None:
        return _newest_whole(directory, contents=False)

    def find() -> Path | None:
        remove_incomplete(directory)
        passed: dict[Path, str] = {}
        newest = _newest_whole(directory, contents=True, passed=passed)
        if newest is None and passed:
            raise CheckpointError(
                f"{directory}: none of its {len(passed)} checkpoints is whole, the newest because: {next(iter(passed.values()))}. Copy one back from where it "
                "is whole, or move them all away to start the run anew"
            )
        if newest is not None and passed:
            for path in passed:
                mark_damaged(path)
            _name_latest(directory, newest.name)
        return newest

    return run_on_rank0(find)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, what a file `latest` names, or the newest whole one of a run directory or its checkpoints/.

    Raises CheckpointError when a directory of checkpoints holds no whole one.
    """
    path = Path(path)
    if path.is_file():
        return path.parent / path.read_text(encoding="utf-8").strip()
    holders = [directory for directory in (path, path / CHECKPOINTS) if list_checkpoints(directory)]
    if (path / MANIFEST).exists() or not holders:
        return path
    newest = _newest_whole(holders[0], contents=False)
    if newest is None:
        raise CheckpointError(f"{holders[0]}: holds no whole checkpoint; give the path of one")
    return newest


def _newest_whole(directory: Path, *, contents: bool, passed: dict[Path, str] | None = None) -> Path | None:
    """`passed` collects those that are not whole, newest first, with what is wrong."""
    for path in reversed(list_checkpoints(directory).values()):
        try:
            verify_files(path, contents=contents)
        except CheckpointError as error:
            get_logger().warning("checkpoint: passed over %s", error)
            if passed is not None:
                passed[path] = str(error)
        else:
            return path
    return None


def _opened(path: Path, *, mesh: Mesh, contents: bool) -> tuple[Path, Manifest]:
    def open_() -> tuple[Path, Manifest]:
        checkpoint = resolve_checkpoint(path)
        return checkpoint, verify_files(checkpoint, contents=contents)

    return run_on_rank0(open_)


def _tower_hash(directory: Path) -> dict[str, str]:
    """The component hash of the tower, from the files just written, so that it is the same at every layout.

    Its 0.3 billion weights take 0.6 s in bf16 on one core, whatever the language model; of that all files were hashed before.
    """
    tower = {name: tensor for name, tensor in stored_tensors(directory).items() if name.startswith("vision.")}
    return hash_components(
        {name: LazyTensor(tensor.shape, tensor.dtype, str(directory), tensor.read) for name, tensor in tower.items()}
    )


def _prepare(target: Path) -> Path:
    remove_incomplete(target.parent)
    return create_staging_directory(target)


def _name_latest(directory: Path, name: str) -> None:
    temporary = directory / f".{LATEST}"
    temporary.write_text(name + "\n", encoding="utf-8")
    os.replace(temporary, directory / LATEST)
    fsync_directory(directory)


def _report(what: str, checkpoint: Path, manifest: Manifest, started: float) -> None:
    seconds, size, step = time.perf_counter() - started, manifest.size / 1e9, manifest.state.step
    get_logger().info(
        "checkpoint: %s %s (step %d, %.3f GB, written at %s) in %.1f s",
        what,
        checkpoint,
        step,
        size,
        manifest.layout,
        seconds,
    )

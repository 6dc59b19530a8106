"""Save and load checkpoints of a run: all ranks write or read one directory; rank 0 verifies and publishes it.

`<run>/checkpoints/step_00000010/` holds the tensors (mcore/dist_checkpoint.py) and manifest.json;
`<run>/checkpoints/latest` names the newest. Collective functions raise an error found on one rank on all ranks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from megatron_share4v.files import atomic_write_text
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.async_writer import HostBuffers
from megatron_share4v.mcore.dist_checkpoint import count_updates, load_sharded, take_snapshot
from megatron_share4v.mcore.dist_checkpoint_files import stored_tensors
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import MegatronOptimizer
from megatron_share4v.model.initialize import SHARDING
from megatron_share4v.parallel.collectives import run_on_rank0

__all__ = [
    "CheckpointContents",
    "FinishSave",
    "RunState",
    "find_latest_complete",
    "find_resume_checkpoint",
    "load_checkpoint",
    "load_weights",
    "resolve_and_read_manifest",
    "resolve_checkpoint",
    "save_checkpoint",
    "start_save",
    "write_checkpoint",
]

LATEST = "latest"
MAX_POINTER_BYTES = 1024  # of a file like `latest`
CHECKPOINTS = "checkpoints"
FinishSave = Callable[[dist.ProcessGroup | None], Path]
"""Writes a snapshot over a group of all ranks (None: the default group) and returns the checkpoint directory.

Collective.
"""


@dataclass(frozen=True, kw_only=True)
class CheckpointContents:
    """What one checkpoint is written from."""

    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer | None
    """None: weights only."""
    mesh: Mesh
    state: RunState
    config_text: str
    """The run's whole configuration, as YAML."""
    assets: Sequence[Path] = ()
    """Files that are copied into the checkpoint (checkpoint/assets.py)."""
    buffers: HostBuffers | None = None
    """Host memory for the snapshot: with it, a thread can write the checkpoint while training continues."""


def save_checkpoint(directory: Path, contents: CheckpointContents) -> Path:
    """Write `directory`/step_<step> and name it in `directory`/latest; return the checkpoint. Collective.

    Leftovers of a killed save are removed first. Raises CheckpointError when the checkpoint cannot be written; existing
    checkpoints are unchanged then.
    """
    return start_save(directory, contents)(None)


def start_save(directory: Path, contents: CheckpointContents) -> FinishSave:
    """Take a snapshot of a checkpoint, and return the function that writes it and names it in `directory`/latest.

    Collective.

    One save must be finished before the next one starts.
    """
    directory = Path(directory)
    target = directory / step_directory_name(contents.state.step)
    finish_write = _start_write(target, contents)

    def finish_save(group: dist.ProcessGroup | None) -> Path:
        finish_write(group)
        run_on_rank0(lambda: _write_latest(directory, target.name), group=group)
        return target

    return finish_save


def write_checkpoint(target: Path, contents: CheckpointContents) -> None:
    """Write the checkpoint `target`, which gets its name only when it is complete. Collective."""
    _start_write(target, contents)(None)


def _start_write(target: Path, contents: CheckpointContents) -> FinishSave:
    started = time.perf_counter()
    staging = run_on_rank0(lambda: _prepare_staging(target))
    optimizer = contents.optimizer
    updates = None if optimizer is None else count_updates(optimizer)
    snapshot = take_snapshot(
        staging, chunks=contents.chunks, optimizer=optimizer, sharding=SHARDING, buffers=contents.buffers
    )

    def write_manifest_and_publish() -> tuple[int, str]:
        for path in contents.assets:
            shutil.copyfile(path, staging / path.name)
        files, weights = hash_files(staging), _tower_hash(staging)
        manifest = Manifest(
            state=contents.state,
            updates=updates,
            layout=contents.mesh.layout,
            config=contents.config_text,
            versions=library_versions(),
            weights=weights,
            files=files,
        )
        write_manifest(staging, manifest)
        publish(staging, target)
        return manifest.size, weights.get("vision", "none")

    def finish_write(group: dist.ProcessGroup | None) -> Path:
        snapshot.write(group)
        size, tower = run_on_rank0(write_manifest_and_publish, group=group)
        seconds = time.perf_counter() - started
        message = "checkpoint: wrote %s, %.3f GB in %.1f s; tower sha256 %s"
        get_logger().info(message, target, size / 1e9, seconds, tower)
        return target

    return finish_write


def load_checkpoint(
    path: Path, *, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, verified: bool = False
) -> RunState:
    """Load weights and optimizer state in place from `path` (see `resolve_checkpoint`), at any layout. Collective.

    `verified`: find_resume_checkpoint has just compared every byte with the manifest, so it is not done again. Returns
    the state of the run that wrote it. Raises CheckpointError when the checkpoint is damaged, holds no optimizer state,
    or belongs to another model or other trained parts.
    """
    started = time.perf_counter()
    checkpoint, manifest = _resolve_and_verify(path, contents=not verified)
    if manifest.updates is None:
        raise CheckpointError(
            f"{checkpoint}: holds only weights, nothing to resume; start a run from it with checkpoint.initialize_from"
        )
    load_sharded(checkpoint, chunks=chunks, optimizer=optimizer, updates=manifest.updates, sharding=SHARDING)
    _log_loaded("loaded", checkpoint, manifest, started)
    return manifest.state


def load_weights(path: Path, *, chunks: Sequence[torch.nn.Module]) -> Manifest:
    """Load only the weights in place from `path` (see `resolve_checkpoint`), whatever parts were trained. Collective.

    Call it before build_optimizer, which copies the weights that it finds. Returns the manifest. Raises CheckpointError
    when the checkpoint is damaged or belongs to another model.
    """
    started = time.perf_counter()
    checkpoint, manifest = _resolve_and_verify(path, contents=True)
    load_sharded(checkpoint, chunks=chunks, optimizer=None, updates=0, sharding=SHARDING)
    _log_loaded("loaded the weights of", checkpoint, manifest, started)
    return manifest


def resolve_and_read_manifest(path: Path) -> tuple[Path, Manifest]:
    """Resolve `path` to a checkpoint and read its manifest, comparing only presence and sizes of its files.

    Collective.
    """
    return _resolve_and_verify(path, contents=False)


def find_latest_complete(directory: Path) -> Path | None:
    """Return the newest checkpoint in `directory` whose files exist with their sizes, or None. Not collective.

    For readers beside a run: nothing is changed. Skipped checkpoints are logged with the reason.
    """
    return _newest_complete(Path(directory), contents=False)


def find_resume_checkpoint(directory: Path) -> Path | None:
    """Return the newest intact checkpoint in `directory` for a run that resumes, or None when there are none.

    Collective.

    Rank 0 removes leftovers of a killed save, reads every byte, and renames damaged checkpoints. Raises CheckpointError
    when there are checkpoints but none is intact, so that a run does not restart from scratch over them.
    """
    directory = Path(directory)

    def find() -> Path | None:
        remove_incomplete(directory)
        skipped: dict[Path, str] = {}
        newest = _newest_complete(directory, contents=True, skipped=skipped)
        if newest is None and skipped:
            raise CheckpointError(
                f"{directory}: none of its {len(skipped)} checkpoints is whole, the newest because: "
                f"{next(iter(skipped.values()))}. Copy one back from an intact copy, "
                "or move them all away to restart the run"
            )
        if newest is not None and skipped:
            for path in skipped:
                mark_damaged(path)
            _write_latest(directory, newest.name)
        return newest

    return run_on_rank0(find)


def resolve_checkpoint(path: Path) -> Path:
    """Resolve `path` to a checkpoint: itself, the one a file `latest` names, or the newest complete one of a run
    directory.

    The run directory's `checkpoints/` is accepted too. Raises CheckpointError when such a directory has no complete
    checkpoint, and for a file that names none.
    """
    path = Path(path)
    if path.is_file():
        return path.parent / _read_pointer(path)
    holders = [directory for directory in (path, path / CHECKPOINTS) if list_checkpoints(directory)]
    if (path / MANIFEST).exists() or not holders:
        return path
    newest = _newest_complete(holders[0], contents=False)
    if newest is None:
        raise CheckpointError(f"{holders[0]}: holds no complete checkpoint; give the path of one")
    return newest


def _read_pointer(path: Path) -> str:
    """Read the name of a directory from a file like `latest`. Raises CheckpointError for any other file."""
    with path.open("rb") as file:
        content = file.read(MAX_POINTER_BYTES + 1)
    try:
        name = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        name = ""
    if not name or len(content) > MAX_POINTER_BYTES or not name.isprintable():
        raise CheckpointError(
            f"{path}: is a file that names no checkpoint; give the directory of a checkpoint, a run or a Hugging Face "
            "export"
        )
    return name


def _newest_complete(directory: Path, *, contents: bool, skipped: dict[Path, str] | None = None) -> Path | None:
    """Find the newest checkpoint that verifies; `skipped` collects the newer ones with their problems."""
    for path in reversed(list_checkpoints(directory).values()):
        try:
            verify_files(path, contents=contents)
        except CheckpointError as error:
            get_logger().warning("checkpoint: passed over %s", error)
            if skipped is not None:
                skipped[path] = str(error)
        else:
            return path
    return None


def _resolve_and_verify(path: Path, *, contents: bool) -> tuple[Path, Manifest]:
    def resolve() -> tuple[Path, Manifest]:
        checkpoint = resolve_checkpoint(path)
        return checkpoint, verify_files(checkpoint, contents=contents)

    return run_on_rank0(resolve)


def _tower_hash(directory: Path) -> dict[str, str]:
    """Hash the vision tower from the files just written, so that the hash is the same at every layout.

    0.3 billion bf16 weights take 0.6 s on one core.
    """
    tower = {name: tensor for name, tensor in stored_tensors(directory).items() if name.startswith("vision.")}
    return hash_components(
        {name: LazyTensor(tensor.shape, tensor.dtype, str(directory), tensor.read) for name, tensor in tower.items()}
    )


def _prepare_staging(target: Path) -> Path:
    remove_incomplete(target.parent)
    return create_staging_directory(target)


def _write_latest(directory: Path, name: str) -> None:
    atomic_write_text(directory / LATEST, name + "\n", durable=True)
    fsync_directory(directory)


def _log_loaded(what: str, checkpoint: Path, manifest: Manifest, started: float) -> None:
    seconds, size, step = time.perf_counter() - started, manifest.size / 1e9, manifest.state.step
    message = "checkpoint: %s %s (step %d, %.3f GB, written at %s) in %.1f s"
    get_logger().info(message, what, checkpoint, step, size, manifest.layout, seconds)

"""The manifest of a checkpoint directory (manifest.json): run state, configuration, and size and SHA-256 of every file.

Plain files, no ranks: checkpoint/store.py decides which processes read or write them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_share4v import __version__
from megatron_share4v.errors import CheckpointError
from megatron_share4v.files import atomic_write_text, read_text
from megatron_share4v.parallel.layout import Layout

MANIFEST = "manifest.json"
FORMAT, READABLE_FORMATS = 2, (1, 2)
"""Format 1 has no `ranges`."""
HASHING_THREADS = max(1, min(8, (os.cpu_count() or 2) // 2))
"""At most half of the cores: a background save leaves the others to the training ranks."""
SHOWN_FILES = 3
BLOCK = 1 << 20
REMEDY = "use another checkpoint, or copy this one again from an intact copy"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run after `step` updates: everything besides tensors that resuming needs."""

    step: int
    consumed_samples: int
    plan_fingerprint: str
    """Identifies the sequence of samples of which `consumed_samples` have been seen."""
    data: dict[str, str | int | float | None] = field(default_factory=dict)
    """Settings that determine that sequence and its tensors (data/sampling/fingerprint.py); empty for conversions."""


@dataclass(frozen=True)
class StoredFile:
    """Size and hash of one checkpoint file."""

    size: int
    sha256: str
    """SHA-256 of the content, or with `ranges` the result of `digest_of_ranges`."""
    ranges: tuple[int, ...] = ()
    """Lengths of the consecutive pieces of the file that were hashed separately.

    A tensor's piece has the hash of its values, which conversion needs anyway, so the bytes are hashed once.
    """


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of one checkpoint."""

    state: RunState
    updates: int | None
    """Step count of the optimizer; None: weights only."""
    layout: Layout
    """Parallel layout at which it was written; it can be loaded at any layout."""
    config: str
    """The run's whole configuration, as YAML."""
    versions: dict[str, str]
    source: str = ""
    """Input of the conversion or averaging that wrote it; empty for a training run."""
    weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each component's weights as stored (checkpoint/lazy_tensor.py).

    A training run hashes only the vision tower: the language model is large.
    """
    files: dict[str, StoredFile] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size for file in self.files.values())


def digest_of_ranges(lengths: Sequence[int], digests: Sequence[str]) -> str:
    """Return the SHA-256 over the lengths and SHA-256 of a file's pieces; any changed byte or boundary changes it."""
    lines = "".join(f"{length} {digest}\n" for length, digest in zip(lengths, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of this package, torch and megatron-core."""
    return {"megatron_share4v": __version__, **{name: version(name) for name in ("torch", "megatron-core")}}


def hash_files(directory: Path, *, known: Mapping[str, StoredFile] | None = None) -> dict[str, StoredFile]:
    """Flush every file in `directory` to the disk and return sizes and SHA-256.

    Files in `known` were flushed and hashed before and are not read again.
    """
    known = known or {}
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST and path.name not in known)
    return {**known, **dict(zip((path.name for path in paths), _map_in_threads(_fsync_and_hash, paths)))}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json and flush it and the directory to the disk."""
    content = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**content, "sha256": _digest_of(content)}, indent=1, ensure_ascii=False) + "\n"
    atomic_write_text(directory / MANIFEST, text, durable=True)
    fsync_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises CheckpointError when it is missing, damaged or of another format."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such checkpoint directory; give the path of one")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the save was interrupted, or this is not a checkpoint; {REMEDY}")
    try:
        content = json.loads(read_text(path))
        stated = content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    if content.get("format") not in READABLE_FORMATS:
        readable = " and ".join(map(str, READABLE_FORMATS))
        raise CheckpointError(
            f"{path}: has format {content.get('format')}, this version reads {readable}; use the one that wrote it"
        )
    if (digest := _digest_of(content)) != stated:
        raise CheckpointError(
            f"{path}: was changed after it was written (sha256 {digest[:12]}, stated {str(stated)[:12]}); {REMEDY}"
        )
    return Manifest(
        state=RunState(**content["state"]),
        updates=content["updates"],
        layout=Layout(**content["layout"]),
        config=content["config"],
        versions=content["versions"],
        source=content.get("source", ""),
        weights=content.get("weights", {}),
        files={
            name: StoredFile(file["size"], file["sha256"], tuple(file.get("ranges", ())))
            for name, file in content["files"].items()
        },
    )


def verify_files(directory: Path, *, contents: bool) -> Manifest:
    """Compare every file's presence and size, and with `contents` its SHA-256, with the manifest; return the manifest.

    Raises CheckpointError naming the first files that differ, and how.
    """
    manifest = read_manifest(directory)
    problems = list(_size_problems(directory, manifest))
    if contents and not problems:
        digests = _map_in_threads(
            lambda name: _sha256(directory / name, manifest.files[name].ranges), list(manifest.files)
        )
        for (name, file), digest in zip(manifest.files.items(), digests):
            if digest != file.sha256:
                problems.append(
                    f"{name} has other content than was written (sha256 {digest[:12]}, manifest {file.sha256[:12]})"
                )
    if problems:
        more = f"; and {len(problems) - SHOWN_FILES} more" if len(problems) > SHOWN_FILES else ""
        raise CheckpointError(f"{directory}: damaged: {'; '.join(problems[:SHOWN_FILES])}{more}; {REMEDY}")
    return manifest


def fsync_directory(directory: Path) -> None:
    """Flush directory entries (created or renamed files) to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_problems(directory: Path, manifest: Manifest) -> Iterable[str]:
    for name, file in manifest.files.items():
        path = directory / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != file.size:
            yield f"{name} has {path.stat().st_size} bytes, manifest {file.size}"
        elif file.ranges and sum(file.ranges) != file.size:
            yield f"{name} has {file.size} bytes, its ranges in the manifest {sum(file.ranges)}"


def _map_in_threads(function: Any, values: list[Any]) -> list[Any]:
    # hashlib and fsync release the interpreter lock.
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(function, values))


def _fsync_and_hash(path: Path) -> StoredFile:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return StoredFile(size=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path, ranges: Sequence[int] = ()) -> str:
    lengths = ranges or (path.stat().st_size,)
    digests, block = [], memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        for length in lengths:
            digest, left = hashlib.sha256(), length
            while left and (count := file.readinto(block[:left])):
                digest.update(block[:count])
                left -= count
            digests.append(digest.hexdigest())
    return digest_of_ranges(lengths, digests) if ranges else digests[0]


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

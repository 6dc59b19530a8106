"""What one checkpoint directory says about itself: manifest.json, with size and SHA-256 of every file beside it, and the check against it.

Plain files, no ranks: which processes read or write them is decided in checkpoint/store.py.
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
from megatron_share4v.parallel.layout import Layout

MANIFEST = "manifest.json"
FORMAT, READABLE_FORMATS = 2, (1, 2)
"""Of format 1 is what has no ranges."""
HASHING_THREADS = max(1, min(8, (os.cpu_count() or 2) // 2))
"""Half of the cores at most: the ranks train on the others when a save runs in the background."""
SHOWN_FILES = 3
BLOCK = 1 << 20
REMEDY = "use another checkpoint, or copy this one again from where it is whole"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands after `step` updates; everything that resuming needs besides tensors."""

    step: int
    consumed_samples: int
    plan_fingerprint: str
    """Identifies the sequence of samples of which `consumed_samples` have been seen."""
    data: dict[str, str | int | float | None] = field(default_factory=dict)
    """What decides that sequence and its tensors, by name (data/sampling/fingerprint.py); empty in checkpoints of conversion."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint."""

    size: int
    sha256: str
    """Of the content, or with `ranges` what `digest_of_ranges` makes of it."""
    ranges: tuple[int, ...] = ()
    """Lengths of the pieces that were hashed one by one, in their order; together they are the file. Who hashes a tensor's values for another reason
    has the hash of that piece already."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of one checkpoint."""

    state: RunState
    updates: int | None
    """Step count of the optimizer; None: weights alone."""
    layout: Layout
    """At which it was written; it can be read at any."""
    config: str
    """The run's whole configuration, as YAML."""
    versions: dict[str, str]
    source: str = ""
    """What conversion or averaging made it from; "": a training run wrote it."""
    weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each component's weights (checkpoint/lazy_tensor.py) as they are stored. A training run hashes the tower alone: the language model is large."""
    files: dict[str, StoredFile] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def digest_of_ranges(lengths: Sequence[int], digests: Sequence[str]) -> str:
    """SHA-256 over the lengths and SHA-256 of a file's pieces. No byte and no border of a piece can change without changing it."""
    lines = "".join(f"{length} {digest}\n" for length, digest in zip(lengths, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Of what writes checkpoints."""
    return {"megatron_share4v": __version__, **{name: version(name) for name in ("torch", "megatron-core")}}


def hash_files(directory: Path, *, known: Mapping[str, StoredFile] | None = None) -> dict[str, StoredFile]:
    """Size and SHA-256 of every file in `directory`, each flushed to the disk; those in `known` were, and are not read again."""
    known = known or {}
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST and path.name not in known)
    return {**known, **dict(zip((path.name for path in paths), _in_threads(_flushed, paths)))}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json and flush it and the directory to the disk."""
    content = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**content, "sha256": _digest_of(content)}, indent=1, ensure_ascii=False) + "\n"
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint `directory`; CheckpointError when it is missing, damaged or of another version."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such checkpoint directory; give the path of one")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the save was interrupted, or this is not a checkpoint; {REMEDY}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
    """The manifest, after comparing presence and size of every file with it, and with `contents` every byte (SHA-256).

    Raises CheckpointError naming the first files that differ, and how.
    """
    manifest = read_manifest(directory)
    problems = list(_different_sizes(directory, manifest))
    if contents and not problems:
        digests = _in_threads(lambda name: _sha256(directory / name, manifest.files[name].ranges), list(manifest.files))
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
    """Make entries that were made or renamed in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _different_sizes(directory: Path, manifest: Manifest) -> Iterable[str]:
    for name, file in manifest.files.items():
        path = directory / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != file.size:
            yield f"{name} has {path.stat().st_size} bytes, manifest {file.size}"
        elif file.ranges and sum(file.ranges) != file.size:
            yield f"{name} has {file.size} bytes, its ranges in the manifest {sum(file.ranges)}"


def _in_threads(function: Any, values: list[Any]) -> list[Any]:
    # hashlib and fsync release the interpreter lock.
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(function, values))


def _flushed(path: Path) -> StoredFile:
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

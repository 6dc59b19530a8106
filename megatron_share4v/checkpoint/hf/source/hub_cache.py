"""Directories of the Hugging Face cache, models--ORG--NAME/snapshots/REVISION: which to open, and their names."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_share4v.errors import ConversionError
from megatron_share4v.files import read_text

_REPOSITORY = "models--"
_SNAPSHOTS = "snapshots"
_SNAPSHOT_PATH = re.compile(rf"(?:^|/){_REPOSITORY}([^/]+)/{_SNAPSHOTS}/[^/]+/*$")


def open_snapshot(path: Path) -> Path:
    """Return the snapshot of a repository's directory in the cache, and any other path unchanged.

    The snapshot is the one of branch main, or the only one. Raises ConversionError when there are several, or none.
    """
    root = path.parent if path.name == _SNAPSHOTS else path
    if not root.name.startswith(_REPOSITORY) or not (root / _SNAPSHOTS).is_dir():
        return path
    main = root / "refs" / "main"
    found = sorted(entry for entry in (root / _SNAPSHOTS).iterdir() if entry.is_dir())
    if main.is_file():
        revision = root / _SNAPSHOTS / read_text(main).strip()
        if revision not in found:
            raise ConversionError(f"{revision}: missing, though {main} names it; download the model again")
        return revision
    if len(found) != 1:
        listed = ", ".join(entry.name for entry in found) or "none"
        raise ConversionError(
            f"{root / _SNAPSHOTS}: which snapshot? It has {listed}; give one of them, or download again"
        )
    return found[0]


def repository_name(path: Path | str) -> str | None:
    """Return ORG/NAME of a snapshot in the cache; None for other paths."""
    found = _SNAPSHOT_PATH.search(str(path))
    return found[1].replace("--", "/", 1) if found else None


def model_name(path: Path | str) -> str:
    """Return the name of the model at a path or hub name: its last component, or the repository's in the cache."""
    return Path(repository_name(path) or path).name


def cached_sibling(snapshot: Path, name: str) -> Path | None:
    """Return the snapshot of the repository `name` (ORG/NAME) in the cache that `snapshot` lies in, if it is there."""
    if repository_name(snapshot) is None:
        return None
    path = snapshot.parents[2] / (_REPOSITORY + name.strip("/").replace("/", "--"))
    return open_snapshot(path) if path.is_dir() else None

"""Open a Hugging Face model where a checkpoint is expected: import it into a temporary checkpoint, as tools/convert.py
does.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.hub_cache import open_snapshot
from megatron_share4v.checkpoint.hf.source.model import CONFIG, HfSource
from megatron_share4v.checkpoint.manifest import MANIFEST
from megatron_share4v.checkpoint.store import resolve_checkpoint
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.parallel.collectives import run_on_rank0


@contextlib.contextmanager
def open_as_checkpoint(path: Path, *, mesh: Mesh) -> Iterator[Path]:
    """Yield the checkpoint that `path` resolves to (see `resolve_checkpoint`), importing a Hugging Face model
    temporarily.

    The import is written below TMPDIR, which all ranks must see, takes as much space as the model, and is removed when
    the block ends. Its conversation template is found as in `choose_template`. Collective. Raises ConversionError on
    all ranks when the model cannot be imported.
    """
    path = open_snapshot(path)
    if not is_hf_model(path):
        yield resolve_checkpoint(path)
        return
    holder = Path(run_on_rank0(lambda: tempfile.mkdtemp(prefix="share4v-")))
    try:
        yield run_on_rank0(lambda: _import(path, holder / "checkpoint"))
    finally:
        if mesh.rank == 0:
            shutil.rmtree(holder)


def is_hf_model(path: Path) -> bool:
    """Return whether `path` is the directory of a Hugging Face model, or its repository in the cache."""
    path = open_snapshot(path)
    return (path / CONFIG).is_file() and not (path / MANIFEST).is_file()


def _import(path: Path, target: Path) -> Path:
    import_model(HfSource(directory=path), target, options=ImportOptions())
    return target

"""A model of another layout, opened where a checkpoint is expected: imported for the moment, through the same door as tools/convert.py."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_share4v.checkpoint.hf.chat_template import detect_template
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source import CONFIG, HfSource
from megatron_share4v.checkpoint.manifest import MANIFEST
from megatron_share4v.checkpoint.store import resolve_checkpoint
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.parallel.collectives import run_on_rank0

CHAT_TEMPLATE = "chat_template.jinja"


@contextlib.contextmanager
def open_as_checkpoint(path: Path, *, mesh: Mesh) -> Iterator[Path]:
    """The checkpoint that `path` means (see `locate`); of a model of another layout, one that is there for the length of the block alone.

    That one is written below TMPDIR, which all ranks must see, and takes as much room as the model. Its template is the one whose chat template
    the model has, or else vicuna_v1, and this is said. Collective. Raises ConversionError, on all ranks, when the model cannot be imported.
    """
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
    """Whether `path` is the directory of a model of another layout."""
    return (path / CONFIG).is_file() and not (path / MANIFEST).is_file()


def _import(path: Path, target: Path) -> Path:
    chat = path / CHAT_TEMPLATE
    template = detect_template(chat.read_text(encoding="utf-8")) if chat.is_file() else None
    options = ImportOptions() if template is None else ImportOptions(template=template)
    if template is None:
        get_logger().warning(
            "%s: has no chat template of ours; template %s is used. To choose another, import it with tools/convert.py",
            path,
            options.template,
        )
    import_model(HfSource(directory=path), target, options=options)
    return target

"""Files that accompany a model's weights unchanged through every run: the tokenizer, and weights that only an export
needs.

`unused.safetensors` holds the vision tower's blocks after the feature layer and its last norm, under CLIP's names below
`vision.`, and the vocabulary rows that a llava-hf model has beyond its tokenizer, as `embedding.added_rows` and
`head.added_rows`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_share4v.config.data import DataConfig
from megatron_share4v.files import atomic_write

TOKENIZER = "tokenizer.model"
UNUSED = "unused.safetensors"
FOLDER = "companions"


def asset_files(directory: Path) -> tuple[Path, ...]:
    """Return the asset files in `directory`: a checkpoint, or the directory that `copy_assets_to_run` returned."""
    return tuple(path for name in (TOKENIZER, UNUSED) if (path := directory / name).is_file())


def tokenizer_path(checkpoint: Path, data: DataConfig) -> Path:
    """Return the checkpoint's own tokenizer file, or else the file that its configuration names."""
    own = checkpoint / TOKENIZER
    return own if own.is_file() else Path(data.tokenizer)


def copy_assets_to_run(run: Path, *, tokenizer: Path, start: Path | None, resumes: bool) -> Path:
    """Copy the tokenizer and the unused weights of the start checkpoint into a run, for the checkpoints that it will
    write.

    A run that resumes keeps the unused weights that it has; a new run does not inherit those of an earlier start.
    Returns the directory of the copies. Call it on one rank.
    """
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _copy(tokenizer, folder / TOKENIZER)
    if start is not None and (start / UNUSED).is_file():
        _copy(start / UNUSED, folder / UNUSED)
    elif not resumes:
        (folder / UNUSED).unlink(missing_ok=True)
    return folder


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as original, atomic_write(target, "wb") as copy:
        shutil.copyfileobj(original, copy)

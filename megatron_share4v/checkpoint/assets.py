"""Files that go with a model's weights through every run, unchanged: the tokenizer, and weights that are needed for export alone.

`unused.safetensors` has the tower's blocks after the feature layer and its last norm, by CLIP's names below `vision.`, and the vocabulary rows
that a llava-hf model has beyond its tokenizer, as `embedding.added_rows` and `head.added_rows`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_share4v.config.data import DataConfig

TOKENIZER = "tokenizer.model"
UNUSED = "unused.safetensors"
FOLDER = "companions"


def asset_files(directory: Path) -> tuple[Path, ...]:
    """Those that lie in `directory`: a checkpoint, or what `copy_assets_to_run` made."""
    return tuple(path for name in (TOKENIZER, UNUSED) if (path := directory / name).is_file())


def tokenizer_path(checkpoint: Path, data: DataConfig) -> Path:
    """The checkpoint's own copy, or the file that its configuration names."""
    own = checkpoint / TOKENIZER
    return own if own.is_file() else Path(data.tokenizer)


def copy_assets_to_run(run: Path, *, tokenizer: Path, start: Path | None, resumes: bool) -> Path:
    """A run's own copies, for the checkpoints that it will write: of its tokenizer, and of the unused weights of the checkpoint it starts from.

    A run that resumes keeps the latter; one that starts anew does not inherit those of an earlier start. Returns their directory. Run it on one rank.
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
    temporary = target.with_name(f".{target.name}")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)

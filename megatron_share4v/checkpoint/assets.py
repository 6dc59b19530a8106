"""Files that accompany a model's weights unchanged through every run: the tokenizer with its settings, and weights that
only an export needs.

`unused.safetensors` holds the vision tower's blocks after the feature layer and its last norm, under the names in its
family's files below `vision.`, and the vocabulary rows that a llava-hf model has beyond its tokenizer, as
`embedding.added_rows` and `head.added_rows`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_share4v.config.data import DataConfig
from megatron_share4v.files import atomic_write
from megatron_share4v.text.load_tokenizer import TOKENIZER_FILES, find_tokenizer, load_tokenizer
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import LEGACY_RULE, TOKENIZER_CONFIG

UNUSED = "unused.safetensors"
FOLDER = "companions"


def asset_files(directory: Path) -> tuple[Path, ...]:
    """Return the asset files in `directory`: a checkpoint, or the directory that `copy_assets_to_run` returned."""
    return tuple(path for name in (*TOKENIZER_FILES, TOKENIZER_CONFIG, UNUSED) if (path := directory / name).is_file())


def tokenizer_path(checkpoint: Path, data: DataConfig) -> Path:
    """Return the checkpoint's own tokenizer file, or else the file that its configuration names."""
    return find_tokenizer(checkpoint) or Path(data.tokenizer)


def open_stored_tokenizer(path: Path) -> Tokenizer:
    """Open a checkpoint's tokenizer file; older checkpoints do not state sentencepiece's rule and have `legacy`."""
    return load_tokenizer(path, default=LEGACY_RULE)


def open_tokenizer(checkpoint: Path, data: DataConfig) -> Tokenizer:
    """Open the tokenizer of a checkpoint (see `tokenizer_path`) with its settings."""
    return open_stored_tokenizer(tokenizer_path(checkpoint, data))


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer's files into a checkpoint, and remove those of another kind."""
    files = tokenizer.files()
    for name, content in files.items():
        with atomic_write(directory / name, "wb") as file:
            file.write(content)
    for name in TOKENIZER_FILES:
        if name not in files:
            (directory / name).unlink(missing_ok=True)


def copy_assets_to_run(run: Path, *, tokenizer: Tokenizer, start: Path | None, resumes: bool) -> Path:
    """Copy the tokenizer and the unused weights of the start checkpoint into a run, for the checkpoints that it will
    write.

    A run that resumes keeps the unused weights that it has; a new run does not inherit those of an earlier start.
    Returns the directory of the copies. Call it on one rank.
    """
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tokenizer)
    if start is not None and (start / UNUSED).is_file():
        _copy(start / UNUSED, folder / UNUSED)
    elif not resumes:
        (folder / UNUSED).unlink(missing_ok=True)
    return folder


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as original, atomic_write(target, "wb") as copy:
        shutil.copyfileobj(original, copy)

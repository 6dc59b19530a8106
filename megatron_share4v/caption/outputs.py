"""Output files from rows in input order: the official list, JSONL, annotations for training, WebDataset shards.

Each file is written atomically; the same rows give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO

from megatron_share4v.caption.records import CaptionRow, ImageEntry
from megatron_share4v.checkpoint.manifest import fsync_directory
from megatron_share4v.data.images.pil_decoder import EXTENSIONS, open_header
from megatron_share4v.data.store.shards import ShardWriter
from megatron_share4v.errors import DataError
from megatron_share4v.files import atomic_write
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

MAX_KEY_LENGTH = 80


def write_official(path: Path, rows: Iterable[CaptionRow]) -> None:
    """Write the published tool's list of {path: caption} (json.dump, indent 4) without failed images."""
    _write_list(path, ({row.path: row.caption} for row in rows if row.error is None))


def write_jsonl(path: Path, rows: Iterable[CaptionRow]) -> None:
    """Write all rows, errors included."""
    with _replacing(path) as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def write_annotations(path: Path, rows: Iterable[CaptionRow], *, prompt: str) -> None:
    """Write ShareGPT4V records of the trainable rows: see `is_trainable`."""
    _write_list(path, (_record(row, prompt=prompt) for row in rows if is_trainable(row)))


def write_shards(
    directory: Path, rows: Iterable[CaptionRow], pictures: Sequence[ImageEntry], *, prompt: str, samples_per_shard: int
) -> None:
    """Write shards of `key.jpg|png|...` and `key.json` (the annotation record) of the trainable rows.

    Raises DataError when an image has disappeared since it was captioned.
    """
    staging = directory.parent / f".{directory.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    writer = ShardWriter(staging, samples_per_shard=samples_per_shard)
    used: set[str] = set()
    for row, picture in zip(rows, pictures, strict=True):
        if not is_trainable(row):
            continue
        data = picture.read()
        key = re.sub(r"[^A-Za-z0-9_~-]", "_", row.id)[:MAX_KEY_LENGTH]
        key = f"{key}~{len(used)}" if key in used else key
        used.add(key)
        text = json.dumps(_record(row, prompt=prompt)).encode()
        writer.write(key, text=text, image=data, extension=EXTENSIONS[str(open_header(data).format)])
    writer.close()
    if directory.exists():
        shutil.rmtree(directory)
    staging.rename(directory)
    fsync_directory(directory.parent)


def is_trainable(row: CaptionRow) -> bool:
    """Whether a row has a non-empty caption without the image placeholder."""
    caption = row.caption or ""
    return row.error is None and bool(caption.strip()) and IMAGE_PLACEHOLDER not in caption


def check_targets(*, annotations: Path | None, shards: Path | None, pictures: Sequence[ImageEntry]) -> None:
    """Check, before the work, that the outputs can be written. Raises DataError."""
    if annotations or shards:
        for picture in pictures:
            if picture.path.startswith("/") or ".." in PurePosixPath(picture.path).parts:
                raise DataError(
                    f"image {picture.path}: annotations need paths inside one folder of images; set it with "
                    "--images-root, and give images relative to it"
                )
    if shards and shards.exists() and any(not path.name.startswith("shard-") for path in shards.iterdir()):
        raise DataError(f"--shards {shards}: holds more than shards; give an empty or new directory")


def _record(row: CaptionRow, *, prompt: str) -> dict[str, object]:
    turns = [{"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{prompt}"}, {"from": "gpt", "value": row.caption}]
    return {"id": row.id, "image": row.path, "conversations": turns}


def _write_list(path: Path, items: Iterator[dict[str, object]]) -> None:
    """Stream what json.dump(list, indent=4) would write."""
    with _replacing(path) as file:
        opening = "[\n"
        for item in items:
            file.write(f"{opening}    " + json.dumps(item, indent=4).replace("\n", "\n    "))
            opening = ",\n"
        file.write("[]" if opening == "[\n" else "\n]")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=True) as file:
        yield file
    fsync_directory(path.parent)

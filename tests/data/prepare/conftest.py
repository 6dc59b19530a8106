"""Fixture with annotations and images for data preparation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_share4v.data.prepare.writer import PrepareOptions


@pytest.fixture
def options(tmp_path: Path, tokenizer_path: Path, picture, record) -> PrepareOptions:
    """Options for 30 records with images as files; every third record has no image, every fifth a missing image."""
    folder = tmp_path / "images" / "coco"
    folder.mkdir(parents=True)
    for number in range(30):
        if number % 5 != 4:
            (folder / f"{number}.png").write_bytes(picture(number))
    records = [record(n, image=n % 3 != 2, length=4) for n in range(30)]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(records), encoding="utf-8")
    return PrepareOptions(
        annotations=annotations,
        images=tmp_path / "images",
        output=tmp_path / "out",
        tokenizer=tokenizer_path,
        max_text_length=512,
        samples_per_shard=5,
        max_rejected_fraction=0.5,
    )

"""JPEGs with lost blocks decode, and are counted at preparation and named by the doctor."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_share4v.data.images.jpeg_damage import find_jpeg_damage
from megatron_share4v.data.images.pil_decoder import validate_image
from megatron_share4v.data.prepare.annotations import AnnotationFile
from megatron_share4v.data.prepare.audit import AnnotationSource, audit_records
from megatron_share4v.data.prepare.image_files import ImageFiles
from megatron_share4v.data.prepare.validate import RecordValidator
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import get_template


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


WHOLE = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True),
    "4:4:4": jpeg(subsampling=0),
    "gray": jpeg("L"),
    "cmyk": jpeg("CMYK"),
    "optimised": jpeg(optimize=True),
    "restarts": jpeg(restart_marker_blocks=4),
    "bytes after the end": jpeg() + bytes(500),
}


def cut(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + data[middle + 2000 :]


def zeroed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(2000) + data[middle + 2000 :]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_have_no_damage(name: str) -> None:
    validate_image(WHOLE[name])
    assert find_jpeg_damage(WHOLE[name]) == ""


@pytest.mark.parametrize("damage", [cut, zeroed])
@pytest.mark.parametrize("name", ["baseline", "progressive", "gray", "cmyk"])
def test_lost_blocks_decode_and_are_found(name: str, damage) -> None:
    data = damage(WHOLE[name])
    validate_image(data)
    assert "Corrupt JPEG data" in find_jpeg_damage(data)


def test_other_formats_have_none(picture) -> None:
    assert [find_jpeg_damage(data) for data in (picture(0), b"", b"\xff\xd8\xff")] == ["", "", ""]


def test_preparation_counts_what_the_doctor_names(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, data in (("a", jpeg()), ("b", cut(jpeg())), ("c", zeroed(jpeg(progressive=True)))):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(data)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    records = [{"id": f"{n}", "image": f"{name}.jpg", "conversations": turns} for n, name in enumerate("abcb")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    options = PrepareOptions(
        annotations=tmp_path / "a.json",
        images=tmp_path / "images",
        output=tmp_path / "out",
        tokenizer=tokenizer_path,
        max_text_length=512,
    )
    summary = prepare(options)
    assert (summary.samples, summary.damaged) == (4, 2)  # b is stored once
    assert "; 2 JPEGs decode with damage (tools/doctor.py data names them)" in str(summary)
    assert "damage" not in str(dataclasses.replace(summary, damaged=0))
    images = ImageFiles(options.images, archives=(), table=None)
    validator = RecordValidator(
        images, SentencePieceTokenizer(tokenizer_path), get_template("vicuna_v1"), 512, keep_bytes=False
    )
    found = audit_records(AnnotationSource(AnnotationFile(options.annotations), validator), workers=0)
    assert found.counts["damaged JPEG"] == 3  # records
    assert "libjpeg: Corrupt JPEG data" in found.examples["damaged JPEG"][0].reason

"""Annotation files: accepted content, and errors for bad files and records."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from megatron_share4v.data.prepare import annotations
from megatron_share4v.data.prepare.annotations import AnnotationFile, count_words, parse_record, source_name
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def test_entries_carry_file_and_position(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": "x", "conversations": TURNS}, 7]), encoding="utf-8")
    first, second = AnnotationFile(path)
    assert first.where == "a.json, record 0 (id 'x')"
    assert (second.where, second.content) == ("a.json, record 1", 7)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2", "after 2 records (the file ends early)"),
        ('[{"a": 1}, {"a": 2', "after 1 records (Expecting ',' delimiter)"),
        ('[{"a": "x', "after 0 records (Unterminated string"),
        ("[1 2]", "after 1 records ('2' where a comma should be)"),
        ("[1,]", "a comma before the end"),
        ("[1], []", "',' after the end of the list"),
        ("[" * 100_000, "nested too deeply"),
        (f"[{'9' * 5000}, 1]", "value has 5000 digits); download"),
        ('{"a": 1}', "holds a JSON object"),
        ("", "is empty; expected a JSON list"),
        ("17", "is no JSON list; expected"),
        ("\0\0\0", "is 3 zero bytes"),
        ("\x1f\udc8b\udcff", "not JSON (gzip-compressed data: unpack it)"),
        ("\udcff\udcfe[\0]\0", "not JSON (UTF-16 text); save it as UTF-8"),
        ("[\udcff]", "not UTF-8 before byte 3"),
    ],
)
def test_files_that_are_no_list_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=re.escape(message)):
        list(AnnotationFile(path))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
def test_chunks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int):
    content = [
        {"id": 'é"\\', "x": [1, -2.5e-7, None, True, {}]},
        12345.678e-9,
        "]",
        -0.5,
        [],
        False,
        {"conversations": TURNS},
        100,
    ]
    monkeypatch.setattr(annotations, "CHUNK_BYTES", size)
    for ascii_only, indent in ((True, None), (False, 1)):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
        assert [entry.content for entry in AnnotationFile(path)] == content


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps([{"id": str(n), "conversations": TURNS, "x": "y" * 9_000} for n in range(1_500)]), encoding="utf-8"
    )
    assert path.stat().st_size > 12 << 20
    tracemalloc.start()
    count = sum(1 for _ in AnnotationFile(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1_500 and peak < 6 * annotations.CHUNK_BYTES


def test_a_record_without_end_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(annotations, "MAX_RECORD", 5_000)
    monkeypatch.setattr(annotations, "CHUNK_BYTES", 1_000)
    path = tmp_path / "a.json"
    path.write_text('[{"a": "' + "x" * 100_000, encoding="utf-8")
    source = AnnotationFile(path)
    with pytest.raises(DataError, match="a record longer than 5000 characters"):
        list(source)
    assert source.bytes_read < 20_000


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nothing.json: cannot be read"):
        AnnotationFile(tmp_path / "nothing.json")


def test_record_with_and_without_image():
    record = parse_record({"id": 5, "image": "coco/1.jpg", "conversations": TURNS}, where="here")
    assert (record.id, record.image) == ("5", "coco/1.jpg")
    assert record.turns == (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat."))
    assert parse_record({"conversations": TURNS}, where="here").image is None
    assert count_words(record.turns) == 6


@pytest.mark.parametrize(
    "content, message",
    [
        (3, "is a int"),
        ({"id": "x"}, "'conversations' is None"),
        ({"conversations": []}, "'conversations' is"),
        ({"conversations": TURNS, "image": ["a", "b"]}, "expected one relative path"),
        ({"conversations": TURNS, "image": "/etc/hosts"}, "outside the folder of images"),
        ({"conversations": TURNS, "image": "a/../../b.jpg"}, "outside the folder of images"),
        ({"conversations": TURNS, "image": None}, "expected one relative path"),
        (
            {"conversations": TURNS, "image": f"data:image/png;base64,{'A' * 9000}"},
            "9022 characters; .* write the image",
        ),
        ({"conversations": TURNS, "image": "x" * 5000}, "'image' is 'xxx.{1,60}, 5000 characters"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 1: 'from' is 'bot'"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": None}]}, "turn 2: 'value' is None"),
        ({"conversations": ["hello"]}, "turn 1: 'from' is None"),
    ],
)
def test_bad_records_are_refused_by_name(content: object, message: str):
    with pytest.raises(DataError, match=message) as error:
        parse_record(content, where="a.json, record 3")
    assert str(error.value).startswith("a.json, record 3")


def test_source_is_the_first_folder():
    assert [source_name(c) for c in ({"image": "sam/images/1.jpg"}, {"image": "1.jpg"}, {}, 3)] == [
        "sam",
        ".",
        "text-only",
        "text-only",
    ]

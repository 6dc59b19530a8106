"""Annotation files: what is read, and how a bad file or record is named."""

import json
from pathlib import Path

import pytest

from megatron_share4v.data.sample import Turn
from megatron_share4v.data.sources import parse_record, read_entries, source_of, word_count
from megatron_share4v.errors import DataError

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def test_entries_carry_file_and_position(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": "x", "conversations": TURNS}, 7]), encoding="utf-8")
    first, second = read_entries(path)
    assert first.where == "a.json, record 0 (id 'x')"
    assert (second.where, second.content) == ("a.json, record 1", 7)


@pytest.mark.parametrize("text, message", [("[1, 2", "not JSON"), ('{"a": 1}', "holds a JSON dict"), ("\udcff", "not JSON")])
def test_files_that_are_no_list_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        read_entries(path)


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nothing.json: cannot be read"):
        read_entries(tmp_path / "nothing.json")


def test_record_with_and_without_image():
    record = parse_record({"id": 5, "image": "coco/1.jpg", "conversations": TURNS}, where="here")
    assert (record.id, record.image) == ("5", "coco/1.jpg")
    assert record.turns == (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat."))
    assert parse_record({"conversations": TURNS}, where="here").image is None
    assert word_count(record.turns) == 6


@pytest.mark.parametrize(
    "content, message",
    [
        (3, "is a int"),
        ({"id": "x"}, "'conversations' is None"),
        ({"conversations": []}, "'conversations' is"),
        ({"conversations": TURNS, "image": ["a", "b"]}, "expected one relative path"),
        ({"conversations": TURNS, "image": None}, "expected one relative path"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 0: 'from' is 'bot'"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": None}]}, "turn 1: 'value' is None"),
        ({"conversations": ["hello"]}, "turn 0: 'from' is None"),
    ],
)
def test_bad_records_are_refused_by_name(content: object, message: str):
    with pytest.raises(DataError, match=message) as error:
        parse_record(content, where="a.json, record 3")
    assert str(error.value).startswith("a.json, record 3")


def test_source_is_the_first_folder():
    assert [source_of(c) for c in ({"image": "sam/images/1.jpg"}, {"image": "1.jpg"}, {}, 3)] == ["sam", ".", "text-only", "text-only"]

"""Records as other trainers write them: pictures under other keys, unread keys, JSON Lines, odd paths."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from pathlib import Path

import pytest
import webdataset

from megatron_share4v.data.prepare.annotations import AnnotationFile
from megatron_share4v.data.prepare.audit import AnnotationSource, audit_records
from megatron_share4v.data.prepare.image_files import ImageFiles
from megatron_share4v.data.prepare.record_keys import describe_unread, find_image, unread_keys
from megatron_share4v.data.prepare.validate import RecordValidator
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import DataError
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import get_template

ABOUT = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]
TEXT = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a cat"}]

TAKEN = {
    "image": "a.png",
    "image, a list of one": ["a.png"],
    "images": ["a.png"],
    "images, one path": "a.png",
    "image_path": "a.png",
    "image_file": "a.png",
    "img": "a.png",
}
EMPTY = [{"image": None}, {"image": ""}, {"image": []}, {"image": float("nan")}, {"images": []}, {"video": None}]
EMPTY += [{"images": [None]}, {"images": [""]}]
PICTURE_IN_TURN = [{**TEXT[0], "image": "a.png"}, TEXT[1]]
REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"conversations": PICTURE_IN_TURN}, "bad record", "turn 1: 'image' is 'a.png'"),
    ({"conversations": [{**TEXT[0], "photo": "a.png"}, TEXT[1]]}, "bad record", "turn 1: 'photo' is 'a.png', which"),
    ({"images": [None], "conversations": ABOUT}, "placeholder without image", "no image ('images' is [None])"),
    ({"images": ["a.png", "b.png"], "conversations": ABOUT}, "bad record", "'images' has 2 entries"),
    ({"images": [{"path": "a.png"}], "conversations": ABOUT}, "bad record", "'images' is {'path': 'a.png'}"),
    ({"picture": "a.png", "conversations": TEXT}, "bad record", "'picture' is 'a.png', which is not read"),
    ({"photo_files": ["a.png"], "conversations": TEXT}, "bad record", "'photo_files' is ['a.png']"),
    ({"video": "a.mp4", "conversations": TEXT}, "bad record", "'video' is 'a.mp4'"),
    ({"image": None, "conversations": ABOUT}, "bad record", "'image' is None and a turn has <image>"),
    ({"images": [], "conversations": ABOUT}, "placeholder without image", "no image ('images' is [])"),
    ({"file": "a.png", "conversations": ABOUT}, "placeholder without image", "is the picture under 'file'?"),
    ({"conversations": ABOUT}, "placeholder without image", "add the image or remove the placeholder"),
    ({"image": ["a.png", "b.png"], "conversations": ABOUT}, "bad record", "expected one relative path"),
]
PATHS = [
    ("sub\\d.png", "there is sub/d.png (/ in place of \\)"),
    ("C:\\data\\x.png", "write / in place of \\"),
    ("A.PNG", "there is a.png (another case of letters)"),
    ("SUB/D.png", "there is sub/d.png (another case of letters)"),
    ("a.png ", "there is a.png (without blanks around it)"),
    (unicodedata.normalize("NFC", "nfd_é.png"), "another Unicode form of the same characters"),
    ("with%20space.png", "there is with space.png (written another way)"),
    ("a.jpg", "there is a.png beside it"),
    ("none.png", "fetch it or leave the record out"),
    ("sub/../a.png", "write it without '..': a.png"),
    ("sub/../../a.png", "outside the folder of images"),
    ("/data/a.png", "outside the folder of images"),
    ("https://example.org/a.png", "a URL; download the picture"),
]


@pytest.fixture
def folder(tmp_path: Path, picture, tokenizer_path: Path) -> PrepareOptions:
    """Options for tmp_path/a.json, and a folder with a few pictures."""
    for name in ("a.png", "b.png", "sub/d.png", "with space.png", unicodedata.normalize("NFD", "nfd_é.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(len(name)))
    return PrepareOptions(
        annotations=tmp_path / "a.json",
        images=tmp_path / "images",
        output=tmp_path / "out",
        tokenizer=tokenizer_path,
        max_text_length=512,
        max_rejected_fraction=0.95,
    )


def prepare_and_audit(options: PrepareOptions, records: list[dict[str, object]]) -> list[dict[str, object]]:
    """Prepare `records` and return rejected.jsonl, which must agree with the doctor."""
    options.annotations.write_text(json.dumps(records))
    summary = prepare(options)
    lines = [json.loads(line) for line in (options.output / "rejected.jsonl").read_text().splitlines()]
    images = ImageFiles(options.images, archives=(), table=None)
    validator = RecordValidator(
        images, SentencePieceTokenizer(options.tokenizer), get_template("vicuna_v1"), 512, keep_bytes=False
    )
    found = []
    source = AnnotationSource(AnnotationFile(options.annotations), validator)
    result = audit_records(source, workers=0, on_finding=lambda finding: found.append((finding.kind, finding.reason)))
    assert [pair for pair in found if not pair[0].startswith(("repeated", "equal"))] == [
        (line["kind"], line["reason"]) for line in lines
    ]
    assert summary.unread == dict(result.unread)
    return lines


def test_the_picture_is_taken_where_its_key_is_plain(folder: PrepareOptions) -> None:
    records = [
        {"id": name, name.split(",")[0]: value, "model": "x", "conversations": ABOUT} for name, value in TAKEN.items()
    ]
    assert prepare_and_audit(folder, records) == []
    index = Index.open(folder.output)
    assert (index.rows["n_img"] == 1).all()
    reader = SampleReader(index)
    assert {reader.read(row, with_image=True).image for row in range(len(records))} == {
        (folder.images / "a.png").read_bytes()
    }

    for sample in webdataset.WebDataset(str(folder.output / "shard-000000.tar"), shardshuffle=False).decode():
        assert list(sample["json"])[:2] == ["id", "image"] and sample["json"]["image"] == "a.png"  # for other readers


def test_an_empty_key_is_text_only(folder: PrepareOptions) -> None:
    assert (
        prepare_and_audit(folder, [{"id": f"{n}", **keys, "conversations": TEXT} for n, keys in enumerate(EMPTY)]) == []
    )
    assert (Index.open(folder.output).rows["n_img"] == 0).all()


def test_pictures_that_would_be_lost_are_refused_with_the_key(folder: PrepareOptions) -> None:
    good = {"id": "good", "image": "a.png", "conversations": ABOUT}
    lines = prepare_and_audit(folder, [good, *(content for content, _, _ in REFUSED)])
    assert len(lines) == len(REFUSED)
    for line, (_, kind, words) in zip(lines, REFUSED):
        assert line["kind"] == kind and words in line["reason"], line


def test_paths_get_the_hint_that_helps(folder: PrepareOptions) -> None:
    good = {"id": "good", "image": "a.png", "conversations": ABOUT}
    lines = prepare_and_audit(folder, [good, *({"image": path, "conversations": ABOUT} for path, _ in PATHS)])
    assert len(lines) == len(PATHS)
    for line, (path, words) in zip(lines, PATHS):
        assert words in line["reason"], (path, line["reason"])


def test_keys_that_are_not_read_are_counted_once(folder: PrepareOptions) -> None:
    weighted = [{**turn, "weight": 0.5} for turn in TEXT]
    records = [
        {"id": "1", "system": "Be brief.", "source": "web", "metadata": None, "conversations": TEXT},
        {"id": "2", "system": "Be brief.", "conversations": weighted},
        {"id": "3", "image": "a.png", "image_url": "http://x/a.png", "conversations": ABOUT},
    ]
    folder.annotations.write_text(json.dumps(records))
    summary = prepare(folder)
    assert summary.unread == {"system": 2, "source": 1, "conversations[].weight": 1, "image_url": 1}
    text = (
        "keys that are not read: 'system' in 2 records, 'conversations[].weight' in 1 records, 'image_url' in 1 records"
    )
    assert text in str(summary)
    assert describe_unread({f"k{n}": 1 for n in range(12)}).endswith(" and 2 other keys")


def test_unread_keys_of_published_records() -> None:
    assert list(unread_keys({"id": "x", "image": "a.png", "conversations": ABOUT, "image_in": {}, "model": ""})) == []
    assert list(unread_keys(5)) == [] and find_image({}) == (None, None)


@pytest.mark.parametrize("text", ["{0}\n{1}\n{2}\n", "{0}\n\n  {1}\r\n{2}", "\ufeff{0} {1}\n{2}\n"])
def test_json_lines(tmp_path: Path, text: str) -> None:
    records = [{"id": f"{n}", "conversations": TEXT} for n in range(3)]
    path = tmp_path / "a.json"
    path.write_text(text.format(*map(json.dumps, records)), encoding="utf-8")
    assert [entry.content for entry in AnnotationFile(path)] == records


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"data": [1]}', r"holds a JSON object \(data\); expected a list of records"),
        ('{"conversations": []}, {}', "',' after a record"),
        ('{"conversations": []}\n[]', r"'\[' after a record"),
        ('{"conversations": []}\n{"conver', "not JSON after 1 records"),
    ],
)
def test_damaged_json_lines_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        list(AnnotationFile(path))


def test_a_resumed_preparation_counts_the_same(folder: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"id": f"{n}", "note": "x", "conversations": TEXT} for n in range(6)]
    folder.annotations.write_text(json.dumps(records))
    options = dataclasses.replace(folder, samples_per_shard=2)
    monkeypatch.setattr("megatron_share4v.data.prepare.writer._finish", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(options)
    monkeypatch.undo()
    assert prepare(options).unread == {"note": 6}

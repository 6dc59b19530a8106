"""Data preparation: files written, each reason for rejecting a record, and no partial publication."""

import dataclasses
import json
import runpy
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.logging import get_logger

TOOL = Path(__file__).parents[3] / "tools" / "prepare_data.py"


@pytest.fixture
def options(prepared, tmp_path: Path) -> PrepareOptions:
    """Options for a small input that is not prepared yet."""
    images = Path(shutil.copytree(prepared.images, tmp_path / "images"))
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(prepared.records[:6]), encoding="utf-8")
    return PrepareOptions(
        annotations=annotations,
        images=images,
        output=tmp_path / "out",
        tokenizer=prepared.tokenizer_path,
        max_text_length=512,
        samples_per_shard=4,
    )


def _change(options: PrepareOptions, *extra: object, **changes: object) -> PrepareOptions:
    records = json.loads(options.annotations.read_text(encoding="utf-8"))
    options.annotations.write_text(json.dumps(records + list(extra)), encoding="utf-8")
    return dataclasses.replace(options, **changes)


def _rejected(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_everything_good_is_kept(options):
    summary = prepare(options)
    assert str(summary) == f"{options.output}: 6 samples (4 with an image) in 2 shards; no record rejected"
    assert sorted(path.name for path in options.output.iterdir()) == [
        "dataset.json",
        "duplicates.jsonl",
        "index.npy",
        "keys.npy",
        "rejected.jsonl",
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    info = json.loads((options.output / "dataset.json").read_text())
    assert info["sources"] == {
        "coco": {"samples": 4, "rejected": 0, "images": 4},
        "text-only": {"samples": 2, "rejected": 0, "images": 0},
    }
    assert (options.output / "rejected.jsonl").read_text() == ""
    assert [path.name for path in options.output.parent.iterdir() if path.name.startswith(".")] == []


def test_a_half_character_in_a_text_that_is_not_trained_stops_nothing(options):
    """Template `plain` drops the human text, so it is not tokenised."""
    record = json.loads(options.annotations.read_text())[0]
    record["conversations"] = [{"from": "human", "value": "<image>\n\ud800"}, {"from": "gpt", "value": "a red circle"}]
    options.annotations.write_text(json.dumps([record]))
    assert prepare(dataclasses.replace(options, template="plain")).samples == 1


def test_workers_write_the_same_bytes(options):
    prepare(options)
    prepare(dataclasses.replace(options, output=options.output.with_name("parallel"), workers=2))
    for path in options.output.iterdir():
        assert path.read_bytes() == (options.output.with_name("parallel") / path.name).read_bytes()


def _png_header(width: int, height: int) -> bytes:
    """Encode a PNG with a size in its header and no pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _bad_records(images: Path) -> dict[str, object]:
    """Return one bad record for each kind of rejection."""
    question, answer = {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a red circle"}
    whole = images / "coco" / "0.png"
    (images / "coco" / "half.png").write_bytes(whole.read_bytes()[:200])
    (images / "coco" / "page.png").write_text("<html>not found</html>")
    (images / "coco" / "empty.png").write_bytes(b"")
    (images / "coco" / "bomb.png").write_bytes(_png_header(60_000, 60_000))
    (images / "coco" / "strip.png").write_bytes(_png_header(5_000, 10))

    def about(image: str, *turns: object) -> dict[str, object]:
        return {"id": "bad", "image": image, "conversations": list(turns)}

    plain_question = {"from": "human", "value": "what is it?"}
    return {
        "missing image": [
            about("coco/none.png", question, answer),
            about("coco/empty.png", question, answer),
            about("a\0b", question, answer),
        ],
        "corrupt image": [about("coco/half.png", question, answer), about("coco/page.png", question, answer)],
        "oversized image": [about("coco/bomb.png", question, answer), about("coco/strip.png", question, answer)],
        "bad record": [
            "text",
            {"id": "bad"},
            about("coco/0.png", {"from": "bot", "value": "x"}, answer),
            about("../images/coco/0.png", question, answer),
            about(str(whole), question, answer),
        ],
        "bad conversation": [
            about("coco/0.png", question, plain_question),
            about("coco/0.png", question, answer, answer),
            about("coco/0.png", question, {"from": "gpt", "value": "\ud800"}),
        ],
        "placeholder mismatch": [
            about("coco/0.png", plain_question, answer),
            about("coco/0.png", question, answer, question, answer),
            about("coco/0.png", {"from": "human", "value": "what " * 600}, answer, question, answer),
        ],
        "no label": [{"id": "bad", "conversations": [{"from": "human", "value": "what " * 600}, answer]}],
    }


def test_every_bad_record_is_named_with_its_reason(options):
    bad = _bad_records(options.images)
    records = [record for group in bad.values() for record in group]
    summary = prepare(_change(options, *records, max_rejected_fraction=0.8))
    lines = _rejected(options.output / "rejected.jsonl")
    assert [line["position"] for line in lines] == list(range(6, 6 + len(records)))
    assert [line["kind"] for line in lines] == [kind for kind, group in bad.items() for _ in group], [
        line["reason"] for line in lines
    ]
    assert all(len(line["reason"]) > 20 for line in lines)
    assert summary.rejected == {kind: len(group) for kind, group in bad.items()}
    assert (
        "19 records rejected (3 bad conversation, 5 bad record, 2 corrupt image, 3 missing image, 1 no label, 2 "
        "oversized image, "
        "3 placeholder mismatch; see rejected.jsonl)"
    ) in str(summary)
    index = Index.open(options.output)
    assert len(index) == 6
    assert index.info.sources["coco"].samples == 4 and index.info.sources["coco"].rejected == 13


def test_too_many_bad_records_publish_nothing_but_the_list(options):
    bad = {"id": "bad", "image": "coco/none.png", "conversations": [{"from": "human", "value": "x"}]}
    options = _change(options, bad)
    with pytest.raises(
        DataError, match=r"1 of 7 records are bad \(14.3%: 1 missing image\), more than --max-rejected-fraction 0.05"
    ):
        prepare(options)
    assert not options.output.exists()
    kept = options.output.with_name("out.rejected.jsonl")
    assert [line["position"] for line in _rejected(kept)] == [6]
    assert not any(path.name.startswith(".") for path in options.output.parent.iterdir())


def test_repeated_and_odd_ids_get_keys_of_their_own(options, prepared):
    record = prepared.records[0]
    extra = [
        record | {"id": "img_0"},
        record | {"id": "a/b.c ü"},
        record | {"id": ""},
        record | {"id": "x" * 300},
        record | {"id": 7},
    ]
    prepare(_change(options, *extra))
    index = Index.open(options.output)
    assert [index.key(row) for row in range(6, 11)] == ["img_0~6", "a_b_c__", "~8", "x" * 64, "7"]
    store = SampleReader(index)
    assert all(store.read(row, with_image=True).image for row in range(6, 11))


def test_image_bytes_are_kept_as_they_are(options, prepared, picture):
    (options.images / "photo.jpeg").write_bytes(picture(5, format="JPEG", size=(50, 40)))
    prepare(_change(options, prepared.records[0] | {"id": "photo", "image": "photo.jpeg"}))
    with tarfile.open(options.output / "shard-000001.tar") as tar:
        assert tar.extractfile("photo.jpg").read() == (options.images / "photo.jpeg").read_bytes()
    assert tuple(Index.open(options.output).rows[6][["width", "height"]]) == (50, 40)


def test_existing_output_is_refused_unless_told_otherwise(options):
    options.output.mkdir()
    prepare(options)
    before = (options.output / "dataset.json").stat().st_mtime_ns
    with pytest.raises(DataError, match="exists and is not empty; choose another directory or pass --overwrite"):
        prepare(options)
    assert (options.output / "dataset.json").stat().st_mtime_ns == before
    prepare(dataclasses.replace(options, overwrite=True, samples_per_shard=100))
    assert [path.name for path in sorted(options.output.glob("*.tar"))] == ["shard-000000.tar"]


def test_inputs_that_cannot_be_used(options):
    cases = {
        "images .*nowhere: not a folder": dataclasses.replace(options, images=options.images / "nowhere"),
        "annotations .*none.json: cannot be read": dataclasses.replace(
            options, annotations=options.annotations.with_name("none.json")
        ),
    }
    for message, bad in cases.items():
        with pytest.raises(DataError, match=message):
            prepare(bad)
    with pytest.raises(DataError):
        prepare(dataclasses.replace(options, tokenizer=options.annotations.with_name("none.model")))
    with pytest.raises(ConfigError):
        prepare(dataclasses.replace(options, template="nonsense"))
    options.annotations.write_text("[]")
    with pytest.raises(DataError, match="holds no records"):
        prepare(options)


@pytest.fixture
def command() -> Iterator[Callable[[list[str]], int]]:
    """Function `main` of the tool; restores the logging set-up afterwards."""
    logger = get_logger()
    before = logger.level, logger.propagate
    yield runpy.run_path(str(TOOL))["main"]
    logger.level, logger.propagate = before
    logger.handlers.clear()


def test_the_command(options, command, capsys):
    named = {
        "annotations": options.annotations,
        "images": options.images,
        "output": options.output,
        "tokenizer": options.tokenizer,
    }
    arguments = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    arguments += ["--workers", "0", "--max-text-length", "512", "--samples-per-shard", "4"]
    assert command(arguments) == 0
    done = capsys.readouterr()
    assert done.out == f"{options.output}: 6 samples (4 with an image) in 2 shards; no record rejected\n"
    assert "prepared 6 records (100% of the file)" in done.err and "records/s" in done.err
    assert command(arguments) == 2
    refused = capsys.readouterr()
    assert refused.out == "" and refused.err.startswith(
        f"prepare_data: output {options.output}: exists and is not empty"
    )
    with pytest.raises(SystemExit, match="2"):
        command([*arguments, "--samples-per-shard", "0"])

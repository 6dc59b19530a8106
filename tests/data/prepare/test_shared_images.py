"""Images shared by several records: stored once, equal after a resume, and readable with plain WebDataset."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megatron_share4v.data.prepare.resume import Journal
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader


def _read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _add_duplicates(records: list[dict]) -> list[dict]:
    """Add two conversations about image 0, a copy of image 1 under another path, and a copy of the first record."""
    about = {**records[3], "image": "coco/0.png"}
    return [
        *records,
        {**about, "id": "again"},
        {**about, "id": "img_3"},
        {**records[1], "id": "copy", "image": "coco/copy.png"},
        records[0],
    ]


@pytest.fixture
def shared(options) -> PrepareOptions:
    """Options for records with duplicate images and a duplicate record."""
    records = json.loads(options.annotations.read_text())
    options.annotations.write_text(json.dumps(_add_duplicates(records)))
    shutil.copy(options.images / "coco" / "1.png", options.images / "coco" / "copy.png")
    return options


def test_a_shared_image_is_stored_once(shared):
    summary = prepare(shared)
    index = Index.open(shared.output)
    store = SampleReader(index)
    image = (shared.images / "coco" / "0.png").read_bytes()
    rows = [row for row in range(len(index)) if index.key(row) in ("img_0", "again", "img_3~31", "img_0~33")]
    assert len(rows) == 4 and all(store.read(row, with_image=True).image == image for row in rows)
    assert len(set(index.rows[rows]["image_offset"].tolist())) == 1
    assert b"".join(path.read_bytes() for path in sorted(shared.output.glob("*.tar"))).count(image) == 1
    assert (index.info.sources["coco"].samples, index.info.sources["coco"].images) == (20, 17)
    lines = [json.loads(line) for line in (shared.output / "duplicates.jsonl").read_text().splitlines()]
    assert lines == [
        {"kind": "record", "keys": ["img_0", "img_0~33"]},
        {"kind": "record", "keys": ["again", "img_3~31"]},
        {"kind": "image", "keys": ["img_1", "copy"]},
    ]
    assert (
        "3 samples share another's image, 2 groups of equal records, 1 groups of equal images under different paths"
        in str(summary)
    )


def test_shared_images_survive_a_kill_and_workers(shared, monkeypatch):
    whole = dataclasses.replace(shared, output=shared.output.with_name("whole"), workers=2)
    prepare(whole)
    commit = Journal.commit

    def last(self, shard):
        commit(self, shard)
        if len(self.shards) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Journal, "commit", last)
        prepare(shared)
    prepare(shared)
    assert _read_files(shared.output) == _read_files(whole.output)


def test_what_a_plain_webdataset_reader_sees(shared):
    for repeat in (False, True):
        options = dataclasses.replace(shared, repeat_images=repeat, output=shared.output.with_name(f"repeat-{repeat}"))
        prepare(options)
        index = Index.open(options.output)
        shards = [str(path) for path in sorted(options.output.glob("*.tar"))]
        decoded = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8")
        samples = {sample["__key__"]: sample for sample in decoded}
        assert list(samples) == [index.key(row) for row in range(len(index))]
        for row, sample in enumerate(samples.values()):
            entry = index.rows[row]
            assert sample["json"]["conversations"]
            if "png" in sample:
                assert sample["png"].shape == (entry["height"], entry["width"], 3)
            elif entry["n_img"]:
                owner = sample["json"]["image_in"]
                assert (
                    not repeat
                    and samples[owner["key"]]["png"] is not None
                    and (options.output / owner["shard"]).is_file()
                )
        assert ("png" in samples["again"]) == repeat and np.array_equal(samples["img_0"]["png"].shape, (20, 20, 3))

"""Index: sample columns, and rejection of files and settings that do not match."""

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import DataError
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import get_template


@pytest.fixture
def copy(prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.directory, tmp_path / "copy"))


def test_rows_describe_the_samples(prepared):
    index = prepared.index
    assert len(index) == 24
    for row, record in enumerate(prepared.records):
        entry = index.rows[row]
        words = sum(len(turn["value"].split()) for turn in record["conversations"])
        assert index.key(row) == record["id"]
        assert entry["words"] == (words if "image" in record else -words)
        assert entry["n_img"] == ("image" in record)
        assert (entry["width"], entry["height"]) == ((20 + row % 7, 20 + row % 5) if "image" in record else (0, 0))
        assert 0 < entry["n_lab"] < entry["n_tok"]
    assert sum(source.samples for source in index.info.sources.values()) == 24


def test_store_reads_text_alone_or_with_the_image(prepared):
    store = SampleReader(prepared.index)
    with_image, without, text_only = (
        store.read(0, with_image=True),
        store.read(0, with_image=False),
        store.read(2, with_image=True),
    )
    assert with_image.image == (prepared.images / "coco/0.png").read_bytes()
    assert (without.image, without.has_image) == (None, True)
    assert (text_only.image, text_only.has_image) == (None, False)
    assert with_image.name == "shard-000000.tar:img_0"
    assert [turn.text for turn in with_image.turns] == [turn["value"] for turn in prepared.records[0]["conversations"]]


def test_pickles_as_its_path(prepared):
    message = pickle.dumps(prepared.index)
    assert len(message) < 500
    assert np.array_equal(pickle.loads(message).rows, prepared.index.rows)


def test_missing_and_cut_shards_are_named_together(copy: Path):
    (copy / "shard-000001.tar").unlink()
    cut = copy / "shard-000003.tar"
    cut.write_bytes(cut.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-000001.tar is missing; shard-000003.tar has \d+ bytes instead of \d+"):
        Index.open(copy)


def test_changed_index_is_refused(copy: Path):
    rows = np.load(copy / "index.npy")
    rows["n_tok"] += 1
    np.save(copy / "index.npy", rows)
    with pytest.raises(DataError, match="index.npy does not match dataset.json"):
        Index.open(copy)


def test_not_a_data_set(tmp_path: Path, copy: Path):
    with pytest.raises(DataError, match="give a directory that tools/prepare_data.py has written"):
        Index.open(tmp_path / "nowhere")
    (copy / "index.npy").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        Index.open(copy)
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        Index.open(copy)


def test_other_version_is_refused(copy: Path):
    content = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        Index.open(copy)


@dataclass(frozen=True)
class OtherTokenizer:
    fingerprint: str = "f" * 64
    rule: str = "legacy"


def test_check_names_each_difference(prepared):
    tokenizer = SentencePieceTokenizer(prepared.tokenizer_path)
    prepared.index.check(tokenizer=tokenizer, template=get_template("vicuna_v1"), max_text_length=512)
    with pytest.raises(
        DataError,
        match="was prepared with other settings than this run's: max_text_length is 64, prepared with 512. Set",
    ):
        prepared.index.check(tokenizer=tokenizer, template=get_template("vicuna_v1"), max_text_length=64)
    with pytest.raises(
        DataError,
        match="tokenizer is ffffffffffff, prepared with .*; tokenizer_rule is legacy, prepared with transformers-4.31; "
        "template is plain, prepared with vicuna_v1",
    ):
        prepared.index.check(tokenizer=OtherTokenizer(), template=get_template("plain"), max_text_length=512)

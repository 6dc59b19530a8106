"""Shards: WebDataset files, read by offset, with an error for each kind of damage."""

import pickle
import tarfile
from pathlib import Path

import pytest

from megatron_share4v.data.store.shards import SampleLocation, ShardReader, ShardWriter
from megatron_share4v.errors import DataError

SAMPLES = [
    ("a", b"{}", b"\xff\xd8image", "jpg"),
    ("b", b'{"x": 1}', b"", ""),
    ("c" * 90, b"{}" * 700, b"p" * 5000, "png"),
]


@pytest.fixture
def written(tmp_path: Path) -> tuple[ShardWriter, list[SampleLocation]]:
    writer = ShardWriter(tmp_path, samples_per_shard=2)
    locations = [
        writer.write(key, text=text, image=image, extension=extension) for key, text, image, extension in SAMPLES
    ]
    writer.close()
    return writer, locations


def test_members_are_read_back_by_position(tmp_path: Path, written):
    writer, locations = written
    assert writer.names == ["shard-000000.tar", "shard-000001.tar"]
    assert [location.shard for location in locations] == [0, 0, 1]
    reader = pickle.loads(pickle.dumps(ShardReader(tmp_path, tuple(writer.names))))
    for (key, text, image, _), location in zip(SAMPLES, locations):
        assert reader.read(location.shard, location.text, key=key) == text
        assert reader.read(location.shard, location.image, key=key) == image
    reader.close()


def test_positions_agree_with_tarfile(tmp_path: Path, written):
    _, locations = written
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        offsets = {member.name: member.offset_data for member in tar}
    assert offsets == {
        "a.jpg": locations[0].image.offset,
        "a.json": locations[0].text.offset,
        "b.json": locations[1].text.offset,
    }


def test_webdataset_reads_them(tmp_path: Path, written):
    import webdataset

    samples = list(webdataset.WebDataset([str(tmp_path / name) for name in written[0].names], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key for key, *_ in SAMPLES]
    assert samples[0]["jpg"] == SAMPLES[0][2] and samples[0]["json"] == b"{}"


def test_same_samples_same_bytes(tmp_path: Path, written):
    again = tmp_path / "again"
    again.mkdir()
    writer = ShardWriter(again, samples_per_shard=2)
    for key, text, image, extension in SAMPLES:
        writer.write(key, text=text, image=image, extension=extension)
    writer.close()
    for name in writer.names:
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_changed_byte_is_found(tmp_path: Path, written):
    writer, locations = written
    path = tmp_path / writer.names[1]
    data = bytearray(path.read_bytes())
    data[locations[2].image.offset + 17] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"shard-000001.tar:{'c' * 90}: crc32 is .* run tools/prepare_data.py again"):
        ShardReader(tmp_path, tuple(writer.names)).read(1, locations[2].image, key="c" * 90)


def test_cut_shard_is_found(tmp_path: Path, written):
    writer, locations = written
    path = tmp_path / writer.names[1]
    path.write_bytes(path.read_bytes()[: locations[2].image.offset + 100])
    with pytest.raises(DataError, match="shard-000001.tar:k: the shard ends at byte"):
        ShardReader(tmp_path, tuple(writer.names)).read(1, locations[2].image, key="k")


def test_missing_shard_is_found(tmp_path: Path, written):
    writer, locations = written
    (tmp_path / writer.names[0]).unlink()
    with pytest.raises(DataError, match="shard-000000.tar: cannot be opened"):
        ShardReader(tmp_path, tuple(writer.names)).read(0, locations[0].text, key="a")

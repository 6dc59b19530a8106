"""Resuming an interrupted preparation, images in archives, images used in place, and a mix of broken records."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_share4v.data.prepare import writer as prepare_module
from megatron_share4v.data.prepare.image_files import scan_images
from megatron_share4v.data.prepare.resume import Journal
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.data.store.index import IN_PLACE, Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import DataError

COUNT = 30


def _change_records(options: PrepareOptions, change) -> None:
    records = json.loads(options.annotations.read_text())
    options.annotations.write_text(json.dumps(change(records)))


def _read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


KILLED_AT_WRITE = """
import os, pickle, signal, sys
from megatron_share4v.data.prepare import writer as module
options, last = pickle.loads(sys.stdin.buffer.read())
write, calls = module.ShardWriter.write, []
def write_or_die(self, *arguments, **named):
    calls.append(1)
    if len(calls) > last:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, *arguments, **named)
module.ShardWriter.write = write_or_die
module.prepare(options)
"""


def test_killed_and_started_again_ends_with_the_same_bytes(options, monkeypatch):
    whole = dataclasses.replace(options, output=options.output.with_name("whole"))
    prepare(whole)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    message = pickle.dumps((options, 13))
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_WRITE], input=message, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not options.output.exists()
    staging = options.output.with_name(".out.partial")
    first = {path.name: path.stat() for path in staging.glob("shard-*.tar")}
    assert sorted(first) == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    parsed = []
    validate_all = prepare_module.validate_all
    monkeypatch.setattr(
        prepare_module,
        "validate_all",
        lambda f, items, workers: validate_all(f, _record_items(items, parsed), workers=workers),
    )
    prepare(options)
    assert _read_files(options.output) == _read_files(whole.output)
    for name in ("shard-000000.tar", "shard-000001.tar"):  # not written again
        stat = (options.output / name).stat()
        assert (stat.st_ino, stat.st_mtime_ns) == (first[name].st_ino, first[name].st_mtime_ns)
    assert 0 < parsed[0].position < COUNT and not staging.exists()


def _record_items(items, seen: list):
    for item in items:
        seen.append(item[0])
        yield item


def _interrupt(options: PrepareOptions, monkeypatch) -> None:
    """Interrupt a preparation while it writes its third shard."""
    write, calls = prepare_module.ShardWriter.write, []

    def broken(self, *arguments, **named):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return write(self, *arguments, **named)

    with monkeypatch.context() as context:
        context.setattr(prepare_module.ShardWriter, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)


@pytest.fixture
def interrupted(options, monkeypatch) -> PrepareOptions:
    """Options of a preparation that was interrupted while it wrote its third shard."""
    _interrupt(options, monkeypatch)
    return options


def test_a_preparation_without_a_finished_shard_does_not_block_another(options):
    """A file that is not JSON ends the first try; its correction is other input, and nothing would be lost."""
    whole = options.annotations.read_text()
    options.annotations.write_text(whole[:-40])
    one_shard = dataclasses.replace(options, samples_per_shard=1000)
    with pytest.raises(DataError, match="not JSON"):
        prepare(one_shard)
    options.annotations.write_text(whole)
    assert prepare(one_shard).samples == len(Index.open(options.output))


def test_other_archives_are_not_mixed_with_those_that_were_begun_in_place(options, monkeypatch):
    """Index rows refer to archives by number; an additional archive would change the numbers."""
    options = dataclasses.replace(options, in_place=True)
    _pack(options.images / "coco", options.images / "coco.tar")
    _interrupt(options, monkeypatch)
    (options.images / "more").mkdir()
    shutil.copy(next(options.images.glob("*.tar")), options.images / "a.tar")
    with pytest.raises(DataError, match=r"other inputs: archives was .*a\.tar.*--restart"):
        prepare(options)
    (options.images / "a.tar").unlink()
    assert prepare(options).samples == 26


def test_what_was_begun_is_kept_when_the_annotations_break_off(options):
    text = options.annotations.read_text()
    options.annotations.write_text(text[: len(text) * 9 // 10])
    with pytest.raises(DataError, match="not JSON after"):
        prepare(options)
    assert len(list(options.output.with_name(".out.partial").glob("shard-*.tar"))) > 1


def test_other_inputs_are_not_mixed_with_what_was_begun(interrupted):
    changed = dataclasses.replace(interrupted, template="v1_mmtag", max_text_length=300)
    differences = "template was 'vicuna_v1', now 'v1_mmtag'; max_text_length was 512, now 300"
    with pytest.raises(DataError, match=f"{differences}. Finish .* or start over with --restart"):
        prepare(changed)
    assert prepare(dataclasses.replace(changed, restart=True)).samples == 26
    assert Index.open(interrupted.output).info.template == "v1_mmtag"


def test_a_finished_shard_that_was_changed_meanwhile_is_noticed(interrupted):
    shard = interrupted.output.with_name(".out.partial") / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        DataError, match="shard-000000.tar: has changed since it was finished; start over with --restart"
    ):
        prepare(interrupted)


def test_two_at_once_are_refused(interrupted):
    lines = (interrupted.output.with_name(".out.partial") / "journal.jsonl").read_text().splitlines()
    journal = Journal.open(interrupted.output.with_name(".out.partial"), identity=json.loads(lines[0]))
    with pytest.raises(DataError, match="another process is preparing this data set"):
        prepare(interrupted)
    journal.close()
    assert prepare(interrupted).samples == 26


def _pack(folder: Path, target: Path, *, opens_with: str = "", compression: int = zipfile.ZIP_STORED) -> None:
    """Move the files of `folder` into an archive with the prefix `opens_with`, and remove the folder."""
    files = sorted(folder.iterdir())
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w", compression) as archive:
            for file in files:
                archive.write(file, f"{opens_with}{file.name}")
    else:
        with tarfile.open(target, "w") as archive:
            for file in files:
                archive.add(file, f"{opens_with}{file.name}")
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("archive", "opens_with", "compression"),
    [
        ("coco.tar", "", 0),
        ("coco.tar", "./", 0),
        ("coco.zip", "", zipfile.ZIP_STORED),
        ("coco.zip", "", zipfile.ZIP_DEFLATED),
        ("downloaded.zip", "coco/", zipfile.ZIP_DEFLATED),
        ("sa_000020.tar", "coco/", 0),
    ],
)
def test_images_come_from_archives(options, archive: str, opens_with: str, compression: int):
    loose = dataclasses.replace(options, output=options.output.with_name("loose"))
    prepare(loose)
    _pack(options.images / "coco", options.images / archive, opens_with=opens_with, compression=compression)
    prepare(dataclasses.replace(options, workers=2 if archive == "coco.zip" else 0))
    packed, wanted = _read_files(options.output), _read_files(loose.output)
    rejected = packed.pop("rejected.jsonl").decode()
    assert "nor in an archive" in rejected and rejected.count("\n") == wanted.pop("rejected.jsonl").count(b"\n")
    assert packed == wanted


def test_damaged_and_unreachable_archives_are_named(options, tmp_path: Path):
    target = options.images / "more.tar"
    _pack(Path(shutil.copytree(options.images / "coco", tmp_path / "more")), target)
    whole = target.read_bytes()
    target.write_bytes(whole[: 512 + 100])
    with pytest.raises(DataError, match="more.tar: is damaged .*; fetch it again"):
        prepare(options)
    target.with_suffix(".zip").write_bytes(b"PK nonsense")
    target.write_bytes(whole)
    with pytest.raises(DataError, match="more.zip: is damaged"):
        prepare(options)
    target.with_suffix(".zip").rename(options.images / "more.tar.gz")
    with pytest.raises(DataError, match="more.tar.gz: is compressed as a whole.*convert it to a plain .tar"):
        prepare(options)


def test_members_that_cannot_be_read_are_refused_one_by_one(options, tmp_path: Path):
    (options.images / "coco" / "0.png").rename(tmp_path / "0.png")
    with zipfile.ZipFile(options.images / "coco.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(tmp_path / "0.png", "0.png")
        archive.write(options.images / "coco" / "1.png", "empty/1.png")
    images = scan_images(options.images, table=tmp_path / "table", in_place=False)
    with pytest.raises(DataError, match="packed with a method other than deflate; unpack the archive"):
        images.read("coco/0.png")
    (options.images / "coco" / "9.gif").write_bytes(b"GIF")
    with pytest.raises(DataError, match="there is 9.gif beside it: rename it, or correct the record"):
        images.read("coco/9.png")


@pytest.mark.parametrize("packed", [False, True])
def test_in_place_reads_the_same_without_a_copy(options, packed: bool):
    copied = dataclasses.replace(options, output=options.output.with_name("copied"))
    prepare(copied)
    if packed:
        _pack(options.images / "coco", options.images / "coco.tar")
    options = dataclasses.replace(options, in_place=True)
    prepare(options)
    actual, reference = (SampleReader(Index.open(directory)) for directory in (options.output, copied.output))
    assert len(actual.index) == len(reference.index) == 26
    for row in range(26):
        one, other = actual.read(row, with_image=True), reference.read(row, with_image=True)
        assert (one.key, one.turns, one.image) == (other.key, other.turns, other.image)
    stored = sum(path.stat().st_size for path in options.output.glob("*.tar"))
    assert stored < sum(path.stat().st_size for path in copied.output.glob("*.tar")) - 16 * 1000
    assert (actual.index.rows["image_shard"][actual.index.rows["n_img"] == 1] == (6 if packed else IN_PLACE)).all()


def test_in_place_notices_what_changed_since(options, picture):
    options = dataclasses.replace(options, in_place=True)
    prepare(options)
    image = options.images / "coco" / "0.png"
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"coco/0.png:img_0: is not the image that was prepared"):
        SampleReader(Index.open(options.output)).read(0, with_image=True)
    image.unlink()
    with pytest.raises(
        DataError, match=r"coco/0.png:img_0: cannot be read .* prepared with --in-place: restore the image"
    ):
        SampleReader(Index.open(options.output)).read(0, with_image=True)
    options.images.rename(options.images.with_name("elsewhere"))
    with pytest.raises(DataError, match="images were left in place and their folder .*images is missing"):
        Index.open(options.output)


def test_in_place_refuses_compressed_archives(options):
    _pack(options.images / "coco", options.images / "coco.zip", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(
        DataError, match="has compressed members, which cannot be used in place; unpack it, or leave out --in-place"
    ):
        prepare(dataclasses.replace(options, in_place=True))


def test_five_percent_of_broken_inputs_of_all_kinds(options, picture, record):
    """With ten of 200 records broken in different ways, the others are prepared and each broken one is reported."""
    coco = options.images / "coco"
    whole = picture(7, format="JPEG", size=(60, 40))
    images = {
        "half.jpg": whole[: len(whole) // 2],
        "nothing.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "vector.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "strip.jpg": picture(7, format="JPEG", size=(2010, 10)),
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    for name, data in images.items():
        (coco / name).write_bytes(data)
    (coco / "0.jpg").write_bytes(whole)
    good = [{**record(number, image=True, length=5), "image": "coco/0.jpg"} for number in range(190)]
    bad = [{**good[0], "id": name, "image": f"coco/{name}"} for name in (*images, "missing.jpg")]
    bad += [
        {**good[0], "id": "nobody", "conversations": []},
        {"id": "masked", "conversations": [{"from": "human", "value": "what " * 600}, {"from": "gpt", "value": "red"}]},
        {**good[0], "id": "twice", "conversations": good[0]["conversations"] * 2},
    ]
    _change_records(
        options,
        lambda _: [item for number in range(10) for item in (*good[number * 19 : number * 19 + 19], bad[number])],
    )
    summary = prepare(dataclasses.replace(options, max_rejected_fraction=0.05))
    assert summary.samples == 190
    lines = [json.loads(line) for line in (options.output / "rejected.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [item["id"] for item in bad]
    assert {line["id"]: line["kind"] for line in lines} == {
        "half.jpg": "corrupt image",
        "nothing.jpg": "missing image",
        "page.jpg": "corrupt image",
        "vector.jpg": "corrupt image",
        "strip.jpg": "oversized image",
        "pointer.jpg": "corrupt image",
        "missing.jpg": "missing image",
        "nobody": "bad record",
        "masked": "no label",
        "twice": "placeholder mismatch",
    }
    with tarfile.open(options.output / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert names[:2] == ["img_0.jpg", "img_0.json"] and all(name.count(".") == 1 for name in names)

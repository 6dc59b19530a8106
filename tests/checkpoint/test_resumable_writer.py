"""Resumable writing: interrupted writes resume, the target is never partial, and memory holds one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_fixtures import read_safetensors, write_llava_hf
from safetensors import safe_open

from megatron_share4v.checkpoint import resumable_writer
from megatron_share4v.checkpoint.hf import exporter, importer
from megatron_share4v.checkpoint.hf.exporter import export_model, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.writer import safetensors_files, write_index
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, hash_components, tensor_sha256
from megatron_share4v.checkpoint.manifest import digest_of_ranges, read_manifest, verify_files
from megatron_share4v.checkpoint.resumable_writer import OutputFile, stage_directory, write_files
from megatron_share4v.errors import ConversionError


class Ended(Exception):
    """Stands in for a signal."""


def part(name: str, content: bytes, log: list[str]) -> OutputFile:
    def write(file, progress) -> dict:
        log.append(name)
        if content == b"end":
            raise Ended
        file.write(content)
        progress(len(content))
        return {"length": len(content)}

    return OutputFile(name, len(content), write)


def test_goes_on_after_the_last_whole_part(tmp_path: Path) -> None:
    target, log = tmp_path / "target", []
    with pytest.raises(Ended), stage_directory(target, fingerprint="a") as staging:
        write_files(
            staging, [part("one", b"1", log), part("two", b"22", log), part("three", b"end", log)], title="test"
        )
    assert not target.exists()
    with open(tmp_path / ".target.journal", "a") as journal:
        journal.write('{"name": "three", "size"')  # cut short by a kill
    log.clear()
    with stage_directory(target, fingerprint="a") as staging:
        written = write_files(
            staging, [part("one", b"1", log), part("two", b"22", log), part("three", b"333", log)], title="test"
        )
    assert log == ["three"] and written["two"].note == {"length": 2}
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"one": b"1", "two": b"22", "three": b"333"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_begins_anew_when_something_else_is_asked_for(tmp_path: Path) -> None:
    target, log = tmp_path / "target", []
    with pytest.raises(Ended), stage_directory(target, fingerprint="a") as staging:
        write_files(staging, [part("one", b"1", log), part("two", b"end", log)], title="test")
    with stage_directory(target, fingerprint="b") as staging:
        assert not list(staging.path.iterdir())
        write_files(staging, [part("two", b"2", log)], title="test")
    assert [path.name for path in target.iterdir()] == ["two"]


def test_a_part_that_lost_bytes_is_written_again(tmp_path: Path) -> None:
    target, log = tmp_path / "target", []
    with pytest.raises(Ended), stage_directory(target, fingerprint="a") as staging:
        write_files(staging, [part("one", b"11", log), part("two", b"end", log)], title="test")
    (tmp_path / ".target.converting" / "one").write_bytes(b"1")
    log.clear()
    with stage_directory(target, fingerprint="a") as staging:
        write_files(staging, [part("one", b"11", log)], title="test")
    assert log == ["one"]


def test_a_large_piece_is_hashed_once_for_all(tmp_path: Path) -> None:
    large = [os.urandom(resumable_writer.LARGE_BYTES + more) for more in (0, 1, 2)]
    pieces = [b"head", large[0], large[1], b"be", b"tween", large[2], b"end"]
    found = {}

    def write(file: resumable_writer.HashingWriter, progress: object) -> dict:
        for number, piece in enumerate(pieces):
            start = file.tell()
            file.write(piece)
            found[number] = file.sha256_of_write(len(piece), since=start)
        assert (
            file.sha256_of_write(len(large[0]), since=5) is None
            and file.sha256_of_write(len(large[0]), since=4) == found[1]
        )
        return {}

    with stage_directory(tmp_path / "target", fingerprint="a") as staging:
        written = write_files(staging, [OutputFile("one", 1, write)], title="test")["one"]
    ranges = [b"head", *large[:2], b"between", large[2], b"end"]
    digests = [hashlib.sha256(piece).hexdigest() for piece in ranges]
    assert (tmp_path / "target" / "one").read_bytes() == b"".join(pieces)
    assert written.stored.ranges == tuple(map(len, ranges)) and written.sha256 == digest_of_ranges(
        written.ranges, digests
    )
    assert found == {0: None, 1: digests[1], 2: digests[2], 3: None, 4: None, 5: digests[4], 6: None}


def test_an_import_hashes_large_tensors_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_writer, "LARGE_BYTES", large := 2000)  # more than the bytes between tensors
    again = []
    monkeypatch.setattr(
        importer, "tensor_sha256", lambda tensor: (again.append(tensor.nbytes), tensor_sha256(tensor))[1]
    )
    manifest = import_model(
        HfSource(directory=write_llava_hf(tmp_path / "hf")), tmp_path / "megatron", options=ImportOptions()
    )
    opened = open_checkpoint(tmp_path / "megatron")
    sizes = [tensor.nbytes for tensor in opened.weights.values()]
    ranges = [length for file in manifest.files.values() for length in file.ranges]
    assert sorted(again) == sorted(size for size in sizes if size < large)
    assert (
        sorted(length for length in ranges if length in sizes and length >= large)
        == sorted(size for size in sizes if size >= large)
        != []
    )
    assert manifest.weights == hash_components(opened.weights)
    verify_files(tmp_path / "megatron", contents=True)


def test_an_empty_part_is_hashed_like_others(tmp_path: Path) -> None:
    with stage_directory(tmp_path / "target", fingerprint="a") as staging:
        written = write_files(staging, [part("one", b"", [])], title="test")["one"]
    assert written.stored.ranges == (0,) and written.sha256 == digest_of_ranges((0,), [hashlib.sha256().hexdigest()])


def test_a_journal_without_ranges_is_taken_up(tmp_path: Path) -> None:
    with pytest.raises(Ended), stage_directory(tmp_path / "target", fingerprint="a") as staging:
        write_files(staging, [part("one", b"1", []), part("two", b"end", [])], title="test")
    journal = tmp_path / ".target.journal"
    journal.write_text(re.sub(r'"ranges": \[1\], ', "", journal.read_text()))
    assert "ranges" not in journal.read_text()
    with stage_directory(tmp_path / "target", fingerprint="a") as staging:
        assert write_files(staging, [part("one", b"end", [])], title="test")["one"].stored.ranges == ()


def test_two_writers_and_an_existing_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with stage_directory(target, fingerprint="a"):
        with (
            pytest.raises(ConversionError, match="written by another process"),
            stage_directory(target, fingerprint="a"),
        ):
            pass
    with pytest.raises(ConversionError, match="exists already"), stage_directory(target, fingerprint="a"):
        pass


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_appears_meanwhile_is_not_touched(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(ConversionError, match="exists already"), stage_directory(target, fingerprint="a") as staging:
        write_files(staging, [part("one", b"1", [])], title="test")
        if kind == "file":
            target.write_text("precious")
        else:
            target.mkdir()
        if kind == "folder":
            (target / "precious").write_text("")
    assert (
        target.read_text() == "precious"
        if kind == "file"
        else [path.name for path in target.iterdir()] == ["precious"] * (kind == "folder")
    )
    assert (tmp_path / ".target.converting" / "one").read_bytes() == b"1"


def test_everything_is_on_the_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def rename(source: Path, target: Path) -> None:
        expected = {str(path) for path in Path(source).rglob("*")} | {str(source)}
        assert expected <= set(flushed), expected - set(flushed)
        renamed(source, target)

    renamed = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with stage_directory(tmp_path / "target", fingerprint="a") as staging:
        write_files(staging, [part("one", b"1", []), part("folder/two", b"2", [])], title="test")
        (staging.path / "three").write_text("3")
        (staging.path / "folder" / "four").write_text("4")
    assert (tmp_path / "target").is_dir() and flushed.count(str(tmp_path / ".target.converting" / "one")) == 1


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    huge = OutputFile("huge", 10**18, lambda file, progress: {})
    with (
        pytest.raises(ConversionError, match=r"GB are free"),
        stage_directory(tmp_path / "target", fingerprint="a") as staging,
    ):
        write_files(staging, [huge], title="test")


KILLED = """
import os, sys
from pathlib import Path
from megatron_share4v.checkpoint.hf import importer
from megatron_share4v.checkpoint.hf import exporter
from megatron_share4v.checkpoint.hf import writer
from megatron_share4v.checkpoint import resumable_writer
from megatron_share4v.checkpoint.hf.source.model import HfSource
importer.FILE_BYTES = 100_000
count, write = 0, resumable_writer._write
def dies(*arguments):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), 9)
    return write(*arguments)
resumable_writer._write = dies
source, target = map(Path, sys.argv[2:])
if sys.argv[1] == "import":
    importer.import_model(HfSource(directory=source), target, options=importer.ImportOptions())
else:
    exporter.export_model(source, target, layout="llava-hf", shard_bytes=100_000)
"""


def killed(what: str, source: Path, target: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", KILLED, what, str(source), str(target)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == -9, result.stderr
    assert not target.exists()


def test_killed_conversions_go_on(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, megatron, back = write_llava_hf(tmp_path / "hf"), tmp_path / "megatron", tmp_path / "back"
    monkeypatch.setattr(importer, "FILE_BYTES", 100_000)
    killed("import", source, megatron, repository)
    with caplog.at_level("INFO", logger="megatron_share4v"):
        manifest = import_model(HfSource(directory=source), megatron, options=ImportOptions())
        assert re.search("resumes with [23] of", caplog.text)  # the third file may not have been recorded
        caplog.clear()
        killed("export", megatron, back, repository)
        export_model(megatron, back, layout="llava-hf", shard_bytes=100_000)
        assert re.search("resumes with [23] of", caplog.text)  # the third file may not have been recorded
    verify_files(megatron, contents=True)
    monkeypatch.setattr(importer, "FILE_BYTES", importer.FILE_BYTES * 100)
    assert (
        import_model(HfSource(directory=source), tmp_path / "at_once", options=ImportOptions()).weights
        == manifest.weights
    )
    before, after = read_safetensors(source), read_safetensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_manifest(megatron).source == "llava-hf: hf"


def test_files_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(2.0),
        "d": torch.randn(7).bfloat16(),
        "e": torch.randn(2, 2).half(),
    }
    lazy = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, "", lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }
    with stage_directory(tmp_path / "target", fingerprint="a") as staging:
        write_files(staging, safetensors_files(lazy, max_bytes=60), title="test")
        write_index(staging.path, lazy, max_bytes=60)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) and list(
        index["weight_map"]
    ) == list(tensors)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "target" / file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensors[name]) and opened.metadata() == {"format": "pt"}


def test_the_modes_of_files_let_others_read(tmp_path: Path) -> None:
    import_model(HfSource(directory=write_llava_hf(tmp_path / "hf")), tmp_path / "megatron", options=ImportOptions())
    export_model(tmp_path / "megatron", tmp_path / "back", layout="llava-hf")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "back" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert exporter.SHARD_BYTES == 5_000_000_000

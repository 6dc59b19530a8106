"""Verification compares a checkpoint's files with its manifest and names every difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_share4v.checkpoint.manifest import (
    BLOCK,
    Manifest,
    RunState,
    StoredFile,
    digest_of_ranges,
    hash_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from megatron_share4v.errors import CheckpointError
from megatron_share4v.parallel.layout import Layout

MANIFEST = Manifest(
    state=RunState(step=3, consumed_samples=48, plan_fingerprint="f00"),
    updates=3,
    layout=Layout(tensor=2, pipeline=2, virtual=2),
    config="run:\n  directory: Übung\n",
    versions={"torch": "2"},
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files and their manifest."""
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
    (tmp_path / ".metadata").write_bytes(b"names")
    write_manifest(tmp_path, replace(MANIFEST, files=hash_files(tmp_path)))
    return tmp_path


def test_a_manifest_reads_back_equal(checkpoint: Path) -> None:
    manifest = verify_files(checkpoint, contents=True)
    assert manifest == read_manifest(checkpoint) == replace(MANIFEST, files=hash_files(checkpoint))
    assert set(manifest.files) == {"__0_0.distcp", ".metadata"} and manifest.size == 256 * 40 + 5


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])


def remove(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()


def flip(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])


def lose_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def cut_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:100])


def edit_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"consumed_samples": 48', '"consumed_samples": 64'))


def other_json(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[]")


def newer_format(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged: __0_0.distcp has 1000 bytes, manifest 10240; use another checkpoint"),
        (remove, "damaged: __0_0.distcp is missing; use another"),
        (lose_manifest, "manifest.json: missing; the save was interrupted"),
        (cut_manifest, "manifest.json: cannot be read"),
        (other_json, "manifest.json: cannot be read"),
        (edit_manifest, "manifest.json: was changed after it was written"),
        (newer_format, "has format 3, this version reads 1 and 2; use the one that wrote it"),
    ],
)
@pytest.mark.parametrize("contents", [False, True])
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], None], message: str, contents: bool) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        verify_files(checkpoint, contents=contents)
    assert message in str(caught.value) and str(checkpoint) in str(caught.value)


def test_a_flipped_byte_is_found_where_contents_are_read(checkpoint: Path) -> None:
    flip(checkpoint)
    verify_files(checkpoint, contents=False)
    with pytest.raises(
        CheckpointError,
        match=r"damaged: __0_0\.distcp has other content than was written \(sha256 \w{12}, manifest \w{12}\)",
    ):
        verify_files(checkpoint, contents=True)


def in_ranges(content: bytes, lengths: tuple[int, ...]) -> StoredFile:
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    digests = [hashlib.sha256(content[start : start + length]).hexdigest() for start, length in zip(starts, lengths)]
    return StoredFile(len(content), digest_of_ranges(lengths, digests), lengths)


def test_a_file_hashed_in_ranges_is_covered_to_the_last_byte(tmp_path: Path) -> None:
    lengths = (7, BLOCK + 3, 1, 90)  # BLOCK + 3 is read in two blocks
    content = bytes(range(251)) * (sum(lengths) // 251 + 1)
    content = content[: sum(lengths)]
    path = tmp_path / "a.distcp"
    path.write_bytes(content)
    write_manifest(tmp_path, replace(MANIFEST, files={path.name: in_ranges(content, lengths)}))
    assert verify_files(tmp_path, contents=True).files[path.name].ranges == lengths
    for position in (0, 6, 7, BLOCK + 6, BLOCK + 9, BLOCK + 10, BLOCK + 11, len(content) - 1):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged: a\.distcp has other content than was written"):
            verify_files(tmp_path, contents=True)


def test_other_borders_are_another_digest(tmp_path: Path) -> None:
    (tmp_path / "a.distcp").write_bytes(b"abcdef")
    stored = in_ranges(b"abcdef", (2, 4))
    write_manifest(tmp_path, replace(MANIFEST, files={"a.distcp": replace(stored, ranges=(4, 2))}))
    with pytest.raises(CheckpointError, match="other content"):
        verify_files(tmp_path, contents=True)
    write_manifest(tmp_path, replace(MANIFEST, files={"a.distcp": replace(stored, ranges=(2, 3))}))
    with pytest.raises(CheckpointError, match="a.distcp has 6 bytes, its ranges in the manifest 5"):
        verify_files(tmp_path, contents=False)


def test_a_manifest_of_format_1_is_read(checkpoint: Path) -> None:
    """Manifests of format 1 have no ranges; their hash is of the content."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["format"] = 1
    content["files"] = {
        name: {
            "size": (checkpoint / name).stat().st_size,
            "sha256": hashlib.sha256((checkpoint / name).read_bytes()).hexdigest(),
        }
        for name in content["files"]
    }
    stated = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": stated}))
    assert verify_files(checkpoint, contents=True).files["__0_0.distcp"].ranges == ()
    flip(checkpoint)
    with pytest.raises(CheckpointError, match="other content"):
        verify_files(checkpoint, contents=True)


def test_many_damaged_files_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.distcp").write_bytes(b"x")
    write_manifest(tmp_path, replace(MANIFEST, files=hash_files(tmp_path)))
    for number in range(5):
        (tmp_path / f"{number}.distcp").unlink()
    with pytest.raises(CheckpointError, match="2.distcp is missing; and 2 more;"):
        verify_files(tmp_path, contents=False)


def test_no_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint directory"):
        read_manifest(tmp_path / "step_00000001")

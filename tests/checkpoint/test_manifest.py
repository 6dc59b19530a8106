"""What a checkpoint says about itself is compared with what is there, and every difference is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_share4v.checkpoint.manifest import Manifest, RunState, describe_files, read_manifest, verify, write_manifest
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
    write_manifest(tmp_path, replace(MANIFEST, files=describe_files(tmp_path)))
    return tmp_path


def test_a_manifest_reads_back_equal(checkpoint: Path) -> None:
    manifest = verify(checkpoint, contents=True)
    assert manifest == read_manifest(checkpoint) == replace(MANIFEST, files=describe_files(checkpoint))
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
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged: __0_0.distcp has 1000 bytes, manifest 10240; use another checkpoint"),
        (remove, "damaged: __0_0.distcp is missing; use another"),
        (lose_manifest, "manifest.json: missing; the save was interrupted"),
        (cut_manifest, "manifest.json: cannot be read"),
        (other_json, "manifest.json: cannot be read"),
        (edit_manifest, "manifest.json: was changed after it was written"),
        (newer_format, "has format 2, this version reads 1"),
    ],
)
@pytest.mark.parametrize("contents", [False, True])
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], None], message: str, contents: bool) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        verify(checkpoint, contents=contents)
    assert message in str(caught.value) and str(checkpoint) in str(caught.value)


def test_a_flipped_byte_is_found_where_contents_are_read(checkpoint: Path) -> None:
    flip(checkpoint)
    verify(checkpoint, contents=False)
    with pytest.raises(CheckpointError, match=r"damaged: __0_0\.distcp has other content than was written \(sha256 \w{12}, manifest \w{12}\)"):
        verify(checkpoint, contents=True)


def test_many_damaged_files_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.distcp").write_bytes(b"x")
    write_manifest(tmp_path, replace(MANIFEST, files=describe_files(tmp_path)))
    for number in range(5):
        (tmp_path / f"{number}.distcp").unlink()
    with pytest.raises(CheckpointError, match="2.distcp is missing; and 2 more;"):
        verify(tmp_path, contents=False)


def test_no_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint directory"):
        read_manifest(tmp_path / "step_00000001")

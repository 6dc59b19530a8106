"""Retention keeps the newest complete checkpoints and those at multiples of keep_every_steps, and at least one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_share4v.checkpoint.manifest import Manifest, RunState, hash_files, write_manifest
from megatron_share4v.checkpoint.retention import (
    create_staging_directory,
    list_checkpoints,
    mark_damaged,
    publish,
    remove_incomplete,
    remove_old_checkpoints,
    step_directory_name,
)
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.layout import Layout


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Log records of the package."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, get_logger().name)
    return caplog


def make(directory: Path, *steps: int) -> None:
    """Write complete checkpoints of these steps."""
    for step in steps:
        target = directory / step_directory_name(step)
        temporary = create_staging_directory(target)
        (temporary / "__0_0.distcp").write_text(str(step))
        state = RunState(step=step, consumed_samples=0, plan_fingerprint="")
        manifest = Manifest(
            state=state, updates=step, layout=Layout(), config="", versions={}, files=hash_files(temporary)
        )
        write_manifest(temporary, manifest)
        publish(temporary, target)


def break_(directory: Path, *steps: int) -> None:
    for step in steps:
        (directory / step_directory_name(step) / "__0_0.distcp").unlink()


def steps(directory: Path) -> list[int]:
    return list(list_checkpoints(directory))


def test_the_newest_and_the_round_ones_stay(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 40, 10, 20, 30, 50)
    removed = remove_old_checkpoints(tmp_path, keep_last=2, keep_every_steps=20)
    assert steps(tmp_path) == [20, 40, 50]
    assert [path.name for path in removed] == ["step_00000010", "step_00000030"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000040", "step_00000050"]
    assert "removed" in messages.text and "step_00000010" in messages.text
    assert remove_old_checkpoints(tmp_path, keep_last=1, keep_every_steps=0) and steps(tmp_path) == [50]
    assert remove_old_checkpoints(tmp_path, keep_last=1, keep_every_steps=0) == [] and steps(tmp_path) == [50]


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    break_(tmp_path, 3, 4)
    remove_old_checkpoints(tmp_path, keep_last=1, keep_every_steps=0)
    assert steps(tmp_path) == [2, 3, 4], "the only whole one stays, newer damaged ones are not touched"
    remove_old_checkpoints(tmp_path, keep_last=2, keep_every_steps=0)
    assert steps(tmp_path) == [2, 3, 4]


def test_nothing_goes_while_nothing_is_whole(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    break_(tmp_path, 1, 2)
    assert remove_old_checkpoints(tmp_path, keep_last=1, keep_every_steps=0) == []
    assert steps(tmp_path) == [1, 2]
    assert remove_old_checkpoints(tmp_path / "absent", keep_last=1, keep_every_steps=0) == []


def test_leftovers_go_and_are_named(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 1)
    (create_staging_directory(tmp_path / step_directory_name(2)) / "part").write_text("x")
    (tmp_path / ".step_00000000.removing").mkdir()
    (tmp_path / "notes").mkdir()
    assert steps(tmp_path) == [1], "an unfinished checkpoint has no name"
    assert len(remove_incomplete(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000001"]
    assert ".step_00000002.writing, left behind" in messages.text
    assert remove_incomplete(tmp_path) == remove_incomplete(tmp_path / "absent") == []


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 1)
    break_(tmp_path, 1)
    make(tmp_path, 1)
    assert (tmp_path / step_directory_name(1) / "__0_0.distcp").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert "is replaced by a new save" in messages.text


def test_steps_beyond_eight_digits_sort_as_numbers(tmp_path: Path) -> None:
    make(tmp_path, 123456789, 2)
    assert steps(tmp_path) == [2, 123456789]


def test_what_is_set_aside_is_no_checkpoint_any_more(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        make(tmp_path, 1)
        mark_damaged(tmp_path / "step_00000001")
    make(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001.damaged",
        "step_00000001.damaged_2",
        "step_00000002",
    ]
    assert list(list_checkpoints(tmp_path)) == [2] and "step_00000001.damaged_2" in messages.text

"""Shared file primitives: atomic writes, locks, JSON lines."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path

import pytest

from megatron_share4v import files


def test_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.atomic_write_json(path, {"é": 1})
    files.atomic_write_json(path, {"é": 2}, durable=True)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_atomic_write_leaves_the_old_content_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_lock_excludes_a_second_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert files.try_lock(first) is True
        assert files.try_lock(second) is False
        first.close()
        files.wait_for_lock(second)
        assert files.try_lock(second) is True

        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(fcntl, "flock", unsupported)
        assert files.try_lock(second) is None


@pytest.mark.parametrize(
    ("content", "left"),
    [(b"", b""), (b"a\nb", b"a\n"), (b"a\n", b"a\n"), (b"x" * 200_000, b""), (b"a\n" + b"x" * 200_000, b"a\n")],
)
def test_partial_line_is_cut_off(tmp_path: Path, content: bytes, left: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert files.truncate_partial_line(path) == len(left)
    assert path.read_bytes() == left
    assert files.truncate_partial_line(tmp_path / "none") == 0


def test_appended_lines_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("ab") as file:
        files.append_json_lines(file, [{"é": 1}, {"b": 2}], durable=True)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"é": 1}, {"b": 2}]

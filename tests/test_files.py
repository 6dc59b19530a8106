"""Shared file primitives: text files, atomic writes, locks, JSON lines."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path

import pytest

from megatron_share4v import files
from megatron_share4v.caption.inputs import read_image_entries
from megatron_share4v.checkpoint.hf.source.reader import read_json
from megatron_share4v.config.load import load_run


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


MARK = b"\xef\xbb\xbf"


def test_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(MARK + "é\r\nb".encode())
    assert files.read_text(tmp_path / "a.txt") == "é\nb"
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    assert files.read_text(tmp_path / "a.txt", errors="replace") == "a\ufffd"
    with pytest.raises(UnicodeDecodeError):
        files.read_text(tmp_path / "a.txt")


def test_files_of_users_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Configurations, JSON of Hugging Face layouts, caption lists; test_benchmark_files.py has those of benchmarks."""
    (tmp_path / "base.yaml").write_bytes(MARK + b"vision: {num_layers: 4}\n")
    (tmp_path / "run.yaml").write_bytes(
        MARK + b"run: {directory: x}\ndata: {train: a, tokenizer: b}\ntrain: {global_batch_size: 8}\n"
    )
    config = load_run(tmp_path / "run.yaml", [f"model.base={tmp_path / 'base.yaml'}"])
    assert (config.train.global_batch_size, config.model.vision.num_layers) == (8, 4)
    (tmp_path / "config.json").write_bytes(MARK + b'{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
    for name, content in (("a.json", b'["a.png"]'), ("a.jsonl", b'{"image": "a.png"}')):
        (tmp_path / name).write_bytes(MARK + content)
        [entry] = read_image_entries(images_file=tmp_path / name, images=(), root=tmp_path)
        assert entry.path == "a.png"

"""A resumed job notices a picture that changed under its name, and reads only pictures with another size or time."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_share4v.infer import picture_stamps
from megatron_share4v.infer.answer_log import AnswerIndex, AnswerLog, DPGroup, resume_answer_log
from megatron_share4v.infer.picture_stamps import PictureSource, PictureStamps

JOB: dict[str, object] = {"model": "m"}


@dataclass(frozen=True)
class Row:
    """Result of one input."""

    id: str
    text: str | None = None
    error: str | None = None


def stamps_of(folder: Path) -> PictureStamps:
    return PictureStamps(lambda name: PictureSource(file=str(folder / name)) if name.endswith(".png") else None)


def run(folder: Path, texts: Mapping[str, str | None], *, rank: int = 0) -> AnswerIndex[Row]:
    """Resume the job in `folder` for the names of `texts`; each new result is the name's text, or an error for None."""
    stamps, journal = stamps_of(folder), AnswerLog(folder / "journal", rank=rank)
    try:
        done = resume_answer_log(journal, job=JOB, row=Row, share=DPGroup(rank=0), restart=False, stamps=stamps)
        left = [Row(name) for name in texts if name not in done]
        for row in stamps.watch(left):
            text = texts[row.id]
            journal.append([Row(row.id, text, None if text is not None else "bad")], stamps=stamps)
    finally:
        journal.close()
        stamps.close()
    return AnswerIndex(folder / "journal", job=JOB, row=Row, find_changed=done.changed.intersection)


def texts_of(index: AnswerIndex[Row], names: str) -> list[str | None]:
    return [row.text for row in index.rows(names.split())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode() * 10)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures whose bytes are read."""
    names: list[str] = []
    digest = picture_stamps._digest

    def record(source: PictureSource) -> str:
        names.append(Path(source.file).name)
        return digest(source)

    monkeypatch.setattr(picture_stamps, "_digest", record)
    return names


def test_changed_picture_is_done_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = {"a.png": "1", "b.png": "2", "c.png": "3", "text": "4"}
    assert texts_of(run(folder, first), "a.png b.png c.png text") == ["1", "2", "3", "4"]
    (folder / "b.png").write_bytes(b"x" * 10)  # the same size
    caplog.set_level(logging.WARNING)
    # the new result is in a log that sorts before the old one
    (folder / "journal/rank0.jsonl").rename(folder / "journal/rank1.jsonl")
    again = run(folder, dict.fromkeys(first, "new"))
    assert texts_of(again, "a.png b.png c.png text") == ["1", "new", "3", "4"]
    assert "1 pictures have changed since their results were made, the first of 'b.png'" in caplog.text
    caplog.clear()
    assert texts_of(run(folder, dict.fromkeys(first, "third")), "a.png b.png") == ["1", "new"] and not caplog.text


def test_touched_copied_and_removed_pictures_have_not_changed(folder: Path, read: list[str]) -> None:
    texts = {"a.png": "1", "b.png": "2", "c.png": "3"}
    run(folder, texts)
    read.clear()
    os.utime(folder / "a.png", ns=(1, 1))
    shutil.copy(folder / "b.png", folder / "copy")
    (folder / "copy").rename(folder / "b.png")
    (folder / "c.png").unlink()
    index = run(folder, dict.fromkeys(texts, "new"))
    assert texts_of(index, "a.png b.png c.png") == ["1", "2", "3"]
    assert sorted(read) == ["a.png", "b.png"]


def test_unchanged_pictures_are_not_read(folder: Path, read: list[str]) -> None:
    run(folder, {"a.png": "1", "b.png": "2"})
    read.clear()
    run(folder, {"a.png": "1", "b.png": "2"})
    assert read == []


def test_failed_result_of_a_changed_picture_is_done_again(folder: Path) -> None:
    assert run(folder, {"a.png": None}).errors == {"a.png"}
    (folder / "a.png").write_bytes(b"repaired")
    index = run(folder, {"a.png": "1"})
    assert texts_of(index, "a.png") == ["1"] and not index.errors


def test_part_of_an_archive_and_bytes_in_memory(folder: Path) -> None:
    archive = folder / "a.tar"
    archive.write_bytes(b"..ab..")
    member = PictureSource(file=str(archive), offset=2, size=2)
    sources = {"member": member, "memory": PictureSource(data=b"1")}
    stamps = PictureStamps(sources.get)
    assert [row.id for row in stamps.watch([Row("member"), Row("memory"), Row("neither")])] == [*sources, "neither"]
    taken = [(name, stamps.take(name) or "") for name in ("member", "memory", "neither")]
    assert taken[2][1] == ""
    archive.write_bytes(b"xxabxx")  # another member has changed
    assert stamps.find_changed(taken[:2]) == set()
    archive.write_bytes(b"xxaBxx")
    sources["memory"] = PictureSource(data=b"2")
    assert stamps.find_changed(taken[:2]) == set(taken[:2])
    stamps.close()


def test_logs_without_stamps_are_still_read(folder: Path) -> None:
    """Logs of earlier versions have no stamps; their results count."""
    run(folder, {"a.png": "1"})
    path = folder / "journal/rank0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "picture"}) + "\n" for row in rows))
    (folder / "a.png").write_bytes(b"x")
    assert texts_of(run(folder, {"a.png": "new"}), "a.png") == ["1"]

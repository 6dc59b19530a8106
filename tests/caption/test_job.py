"""Caption jobs with a fake captioner: answer logs, crashes, several ranks, output files."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megatron_share4v.caption.inputs import read_image_entries
from megatron_share4v.caption.job import JobOptions, run_job
from megatron_share4v.caption.progress import Progress
from megatron_share4v.caption.records import CaptionRow, CaptionSettings, ImageEntry
from megatron_share4v.errors import DataError
from megatron_share4v.infer.answer_log import DPGroup

PATHS = [f"{number}.png" for number in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)]
BAD = {"4.png"}


class Killed(Exception):
    """Simulated kill of the captioner."""


class FakeCaptioner:
    """Captioner whose captions depend on the image alone; yields pairs of rows, the second one first.

    Raises Killed after `rows_until_kill` images; records the ids of the images it receives.
    """

    def __init__(self, rows_until_kill: int | None = None, bad: set[str] = BAD) -> None:
        self.rows_until_kill, self.bad, self.received = rows_until_kill, bad, []

    def __call__(self, pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        rows = []
        for picture in pictures:
            self.received.append(picture.id)
            if picture.path in self.bad:
                rows.append(CaptionRow(picture.id, picture.path, error="is bad"))
            else:
                rows.append(
                    CaptionRow(
                        picture.id, picture.path, caption=f'é "{picture.id}"\nline', tokens=3, finish_reason="stop"
                    )
                )
            if len(rows) == 2:
                yield rows[::-1]
                rows = []
            if self.rows_until_kill is not None and len(self.received) >= self.rows_until_kill:
                raise Killed
        if rows:
            yield rows


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for name in set(PATHS):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (int(name[0]) * 20, 0, 0)).save(picture, format="PNG")
        (root / name).write_bytes(picture.getvalue())
    (root / "list.json").write_text(json.dumps(PATHS))
    return root


def options(images: Path, out: Path, **more) -> JobOptions:
    files = {"jsonl": out / "rows.jsonl", "annotations": out / "train.json", "shards": out / "shards"}
    return JobOptions(
        save_path=out / "captions.json", images_file=images / "list.json", images_root=images, **{**files, **more}
    )


def run(captioner, given: JobOptions, *, model: str = "m", share: DPGroup = DPGroup(), **settings):
    return run_job(captioner, given, settings=CaptionSettings(**settings), model=model, share=share)


def files_of(out: Path) -> dict[str, bytes]:
    """All output files, without the answer logs."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "journal" not in str(path)
    }


@pytest.fixture
def uninterrupted(images: Path, tmp_path: Path) -> dict[str, bytes]:
    summary = run(FakeCaptioner(), options(images, tmp_path / "whole"))
    assert (summary.images, summary.captions, summary.errors, summary.exit_code) == (10, 9, 1, 3)
    return files_of(tmp_path / "whole")


def test_official_file(uninterrupted: dict[str, bytes], images: Path) -> None:
    ids = {
        picture.id: picture.path
        for picture in read_image_entries(images_file=images / "list.json", images=(), root=images)
    }
    expected = [{path: f'é "{name}"\nline'} for name, path in ids.items() if path not in BAD]
    assert uninterrupted["captions.json"].decode() == json.dumps(expected, indent=4)
    assert [next(iter(entry)) for entry in expected] == [path for path in PATHS if path not in BAD], (
        "input order, duplicates kept"
    )


def test_jsonl_has_all_rows(uninterrupted: dict[str, bytes]) -> None:
    rows = [json.loads(line) for line in uninterrupted["rows.jsonl"].splitlines()]
    assert [row["path"] for row in rows] == PATHS
    assert [row["error"] for row in rows if row["caption"] is None] == ["is bad"]
    assert set(rows[0]) == {"id", "path", "caption", "tokens", "finish_reason", "error"}


def test_shards_hold_images_and_records(uninterrupted: dict[str, bytes], tmp_path: Path, images: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "whole/shards/shard-000000.tar") as tar:
        found = {name: tar.extractfile(name).read() for name in tar.getnames()}
    records = json.loads(uninterrupted["train.json"])
    assert len(records) == 9 and len(found) == 18
    for record in records:
        assert json.loads(found[f"{record['id']}.json"]) == record
        assert found[f"{record['id']}.png"] == (images / record["image"]).read_bytes()
    assert records[0]["conversations"][0]["value"] == f"<image>\n{CaptionSettings().prompt}"


@pytest.mark.parametrize("rows_until_kill", range(1, 10))
def test_killed_and_resumed_job_gives_equal_files(
    rows_until_kill: int, images: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    given = options(images, tmp_path / "killed")
    first, second = FakeCaptioner(rows_until_kill), FakeCaptioner()
    with pytest.raises(Killed):
        run(first, given)
    journal = given.journals / "rank0.jsonl"
    kept = len(journal.read_bytes().splitlines()) - 1
    with journal.open("ab") as file:
        file.write(b'{"id": "torn')
    run(second, given)
    assert files_of(tmp_path / "killed") == uninterrupted
    assert len(second.received) == 10 - kept, "only the remaining images are captioned"
    third = FakeCaptioner()
    run(third, given)
    assert files_of(tmp_path / "killed") == uninterrupted and third.received == []


def dp_groups(size: int) -> list[DPGroup]:
    barrier = threading.Barrier(size, timeout=20)
    return [DPGroup(rank=rank, size=size, barrier=barrier.wait) for rank in range(size)]


def run_ranks(size: int, given: JobOptions, captioners) -> list:
    """Run one thread per rank; returns their results or exceptions."""
    results: list = [None] * size

    def work(share: DPGroup) -> None:
        try:
            results[share.rank] = run(captioners[share.rank], given, share=share)
        except (Killed, threading.BrokenBarrierError) as error:
            results[share.rank] = error
            if isinstance(error, Killed):
                barrier_of[0].barrier.__self__.abort()

    barrier_of = dp_groups(size)
    threads = [threading.Thread(target=work, args=(share,)) for share in barrier_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_three_ranks_equal_one(images: Path, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    captioners = [FakeCaptioner() for _ in range(3)]
    results = run_ranks(3, options(images, tmp_path / "three"), captioners)
    assert results[0].images == 10 and results[1:] == [None, None]
    assert files_of(tmp_path / "three") == uninterrupted
    assert sorted(len(captioner.received) for captioner in captioners) == [3, 3, 4]


def test_job_resumes_with_fewer_ranks(images: Path, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    given = options(images, tmp_path / "fewer")
    assert any(
        isinstance(result, Killed)
        for result in run_ranks(3, given, [FakeCaptioner(2), FakeCaptioner(3), FakeCaptioner(2)])
    )
    assert any(isinstance(result, Killed) for result in run_ranks(2, given, [FakeCaptioner(1), FakeCaptioner(2)]))
    run(FakeCaptioner(), given)
    assert files_of(tmp_path / "fewer") == uninterrupted


def test_finished_job_continues_with_more_images(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    run(FakeCaptioner(), given)
    (images / "list.json").write_text(json.dumps(["2.png", *PATHS, "6.png"]))
    more = FakeCaptioner()
    summary = run(more, given)
    assert summary.images == 12 and len(more.received) == 2


def test_changed_image_is_captioned_again(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = options(images, tmp_path / "out")
    run(FakeCaptioner(), given)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (0, 90, 0)).save(picture, format="PNG")
    (images / "9.png").write_bytes(picture.getvalue())
    again = FakeCaptioner()
    run(again, given)
    assert [entry.path for entry in entries_of(images) if entry.id in again.received] == ["9.png"]
    assert "1 pictures have changed" in caplog.text
    unchanged = FakeCaptioner()
    run(unchanged, given)
    assert unchanged.received == []


def entries_of(images: Path) -> list[ImageEntry]:
    return read_image_entries(images_file=images / "list.json", images=(), root=images)


def test_errors_are_retried_only_with_retry_errors(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    run(FakeCaptioner(), given)
    assert run(FakeCaptioner(bad=set()), given).errors == 1
    repaired = FakeCaptioner(bad=set())
    assert run(repaired, options(images, tmp_path / "out", retry_errors=True)).exit_code == 0
    assert len(repaired.received) == 1
    assert run(FakeCaptioner(), given).errors == 0, "a caption is not replaced by an older error"


def test_other_settings_are_rejected(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    run(FakeCaptioner(), given)
    with pytest.raises(DataError, match="temperature was 0.0, now 0.7.*--restart"):
        run(FakeCaptioner(), given, temperature=0.7)
    with pytest.raises(DataError, match="model was 'm', now 'other'"):
        run(FakeCaptioner(), given, model="other")
    restarted = FakeCaptioner()
    run(restarted, options(images, tmp_path / "out", restart=True), model="other")
    assert len(restarted.received) == 10


def test_second_job_on_one_answer_log_is_rejected(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")

    def captioner(pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        with pytest.raises(DataError, match="another process is at this job"):
            run(FakeCaptioner(), given)
        yield from FakeCaptioner()(pictures)

    run(captioner, given)


def test_damaged_answer_log_is_rejected(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    run(FakeCaptioner(), given)
    journal = given.journals / "rank0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"{]\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"rank0.jsonl:4: is damaged"):
        run(FakeCaptioner(), given)


def test_invalid_outputs_are_rejected_before_captioning(images: Path, tmp_path: Path) -> None:
    (images / "list.json").write_text(json.dumps([str(images / "1.png")]))
    captioner = FakeCaptioner()
    with pytest.raises(DataError, match="--images-root"):
        run(captioner, options(images, tmp_path / "out"))
    (images / "list.json").write_text(json.dumps(PATHS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds more than shards"):
        run(captioner, options(images, tmp_path / "out", shards=tmp_path / "mine"))
    assert captioner.received == []


def test_annotations_exclude_untrainable_captions(images: Path, tmp_path: Path) -> None:
    texts = iter(["fine", " ", "an <image> in it", *["fine"] * 7])

    def captioner(pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        yield [
            CaptionRow(picture.id, picture.path, caption=next(texts), tokens=1, finish_reason="stop")
            for picture in pictures
        ]

    assert run(captioner, options(images, tmp_path / "out")).trainable == 8
    assert len(json.loads((tmp_path / "out/train.json").read_text())) == 8
    assert len(json.loads((tmp_path / "out/captions.json").read_text())) == 10


def test_progress_line_with_remaining_time() -> None:
    now = [100.0]
    progress = Progress(total=100, done=40, clock=lambda: now[0])
    now[0] += 10
    progress.advance([CaptionRow("a", "a", caption="x", tokens=50), CaptionRow("b", "b", error="bad")] * 5)
    assert str(progress) == "captioned 50 of 100 images (5 errors): 1.00 images/s, 25.0 tokens/s, 0:00:50 left"

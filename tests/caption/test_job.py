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
    """The captioner is killed."""


class Fake:
    """Captions that depend on the image alone, in pairs, the second one first; raises Killed after `lives` rows.

    Records the images it was given.
    """

    def __init__(self, lives: int | None = None, bad: set[str] = BAD) -> None:
        self.lives, self.bad, self.asked = lives, bad, []

    def __call__(self, pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        rows = []
        for picture in pictures:
            self.asked.append(picture.id)
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
            if self.lives is not None and len(self.asked) >= self.lives:
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


def do(captioner, given: JobOptions, *, model: str = "m", share: DPGroup = DPGroup(), **settings):
    return run_job(captioner, given, settings=CaptionSettings(**settings), model=model, share=share)


def files_of(out: Path) -> dict[str, bytes]:
    """All output files, without the answer logs."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "journal" not in str(path)
    }


@pytest.fixture
def undisturbed(images: Path, tmp_path: Path) -> dict[str, bytes]:
    summary = do(Fake(), options(images, tmp_path / "whole"))
    assert (summary.images, summary.captions, summary.errors, summary.exit_code) == (10, 9, 1, 3)
    return files_of(tmp_path / "whole")


def test_the_official_file(undisturbed: dict[str, bytes], images: Path) -> None:
    ids = {
        picture.id: picture.path
        for picture in read_image_entries(images_file=images / "list.json", images=(), root=images)
    }
    expected = [{path: f'é "{name}"\nline'} for name, path in ids.items() if path not in BAD]
    assert undisturbed["captions.json"].decode() == json.dumps(expected, indent=4)
    assert [next(iter(entry)) for entry in expected] == [path for path in PATHS if path not in BAD], (
        "input order, duplicates kept"
    )


def test_all_rows_in_jsonl(undisturbed: dict[str, bytes]) -> None:
    rows = [json.loads(line) for line in undisturbed["rows.jsonl"].splitlines()]
    assert [row["path"] for row in rows] == PATHS
    assert [row["error"] for row in rows if row["caption"] is None] == ["is bad"]
    assert set(rows[0]) == {"id", "path", "caption", "tokens", "finish_reason", "error"}


def test_shards_hold_images_and_records(undisturbed: dict[str, bytes], tmp_path: Path, images: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "whole/shards/shard-000000.tar") as tar:
        found = {name: tar.extractfile(name).read() for name in tar.getnames()}
    records = json.loads(undisturbed["train.json"])
    assert len(records) == 9 and len(found) == 18
    for record in records:
        assert json.loads(found[f"{record['id']}.json"]) == record
        assert found[f"{record['id']}.png"] == (images / record["image"]).read_bytes()
    assert records[0]["conversations"][0]["value"] == f"<image>\n{CaptionSettings().prompt}"


@pytest.mark.parametrize("lives", range(1, 10))
def test_killed_anywhere_and_resumed_is_undisturbed(
    lives: int, images: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    given = options(images, tmp_path / "killed")
    first, second = Fake(lives), Fake()
    with pytest.raises(Killed):
        do(first, given)
    journal = given.journals / "rank0.jsonl"
    kept = len(journal.read_bytes().splitlines()) - 1
    with journal.open("ab") as file:
        file.write(b'{"id": "torn')
    do(second, given)
    assert files_of(tmp_path / "killed") == undisturbed
    assert len(second.asked) == 10 - kept, "only what was left is asked"
    third = Fake()
    do(third, given)
    assert files_of(tmp_path / "killed") == undisturbed and third.asked == []


def shares(size: int) -> list[DPGroup]:
    barrier = threading.Barrier(size, timeout=20)
    return [DPGroup(rank=rank, size=size, barrier=barrier.wait) for rank in range(size)]


def do_shared(size: int, given: JobOptions, makers) -> list:
    """Run one thread per rank; returns what they return or raise."""
    results: list = [None] * size

    def work(share: DPGroup) -> None:
        try:
            results[share.rank] = do(makers[share.rank], given, share=share)
        except (Killed, threading.BrokenBarrierError) as error:
            results[share.rank] = error
            if isinstance(error, Killed):
                barrier_of[0].barrier.__self__.abort()

    barrier_of = shares(size)
    threads = [threading.Thread(target=work, args=(share,)) for share in barrier_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_three_ranks_equal_one(images: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    makers = [Fake() for _ in range(3)]
    results = do_shared(3, options(images, tmp_path / "three"), makers)
    assert results[0].images == 10 and results[1:] == [None, None]
    assert files_of(tmp_path / "three") == undisturbed
    assert sorted(len(maker.asked) for maker in makers) == [3, 3, 4]


def test_a_job_of_three_ranks_goes_on_with_two_and_with_one(
    images: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    given = options(images, tmp_path / "fewer")
    assert any(isinstance(result, Killed) for result in do_shared(3, given, [Fake(2), Fake(3), Fake(2)]))
    assert any(isinstance(result, Killed) for result in do_shared(2, given, [Fake(1), Fake(2)]))
    do(Fake(), given)
    assert files_of(tmp_path / "fewer") == undisturbed


def test_more_images_are_added_to_a_finished_job(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    do(Fake(), given)
    (images / "list.json").write_text(json.dumps(["2.png", *PATHS, "6.png"]))
    more = Fake()
    summary = do(more, given)
    assert summary.images == 12 and len(more.asked) == 2


def test_errors_are_tried_again_on_request_only(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    do(Fake(), given)
    assert do(Fake(bad=set()), given).errors == 1
    repaired = Fake(bad=set())
    assert do(repaired, options(images, tmp_path / "out", retry_errors=True)).exit_code == 0
    assert len(repaired.asked) == 1
    assert do(Fake(), given).errors == 0, "a caption is not replaced by an older error"


def test_other_settings_are_not_mixed_in(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    do(Fake(), given)
    with pytest.raises(DataError, match="temperature was 0.0, now 0.7.*--restart"):
        do(Fake(), given, temperature=0.7)
    with pytest.raises(DataError, match="model was 'm', now 'other'"):
        do(Fake(), given, model="other")
    anew = Fake()
    do(anew, options(images, tmp_path / "out", restart=True), model="other")
    assert len(anew.asked) == 10


def test_two_jobs_do_not_write_one_journal(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")

    def captioner(pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        with pytest.raises(DataError, match="another process is at this job"):
            do(Fake(), given)
        yield from Fake()(pictures)

    do(captioner, given)


def test_a_damaged_journal_is_named(images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / "out")
    do(Fake(), given)
    journal = given.journals / "rank0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"{]\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"rank0.jsonl:4: is damaged"):
        do(Fake(), given)


def test_what_could_not_be_written_is_refused_before_the_work(images: Path, tmp_path: Path) -> None:
    (images / "list.json").write_text(json.dumps([str(images / "1.png")]))
    captioner = Fake()
    with pytest.raises(DataError, match="--images-root"):
        do(captioner, options(images, tmp_path / "out"))
    (images / "list.json").write_text(json.dumps(PATHS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds more than shards"):
        do(captioner, options(images, tmp_path / "out", shards=tmp_path / "mine"))
    assert captioner.asked == []


def test_captions_that_cannot_be_trained_are_left_out_of_annotations(images: Path, tmp_path: Path) -> None:
    texts = iter(["fine", " ", "an <image> in it", *["fine"] * 7])

    def captioner(pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        yield [
            CaptionRow(picture.id, picture.path, caption=next(texts), tokens=1, finish_reason="stop")
            for picture in pictures
        ]

    assert do(captioner, options(images, tmp_path / "out")).trainable == 8
    assert len(json.loads((tmp_path / "out/train.json").read_text())) == 8
    assert len(json.loads((tmp_path / "out/captions.json").read_text())) == 10


def test_progress_says_how_long_still() -> None:
    now = [100.0]
    progress = Progress(total=100, done=40, clock=lambda: now[0])
    now[0] += 10
    progress.advance([CaptionRow("a", "a", caption="x", tokens=50), CaptionRow("b", "b", error="bad")] * 5)
    assert str(progress) == "captioned 50 of 100 images (5 errors): 1.00 images/s, 25.0 tokens/s, 0:00:50 left"

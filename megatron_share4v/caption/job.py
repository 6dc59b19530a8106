"""One caption job from inputs to output files: distribution over ranks, resuming, and merging.

Ranks share the remaining images, each with its own answer log; rank 0 merges the logs when all have finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.caption.inputs import read_image_entries
from megatron_share4v.caption.outputs import (
    check_targets,
    is_trainable,
    write_annotations,
    write_jsonl,
    write_official,
    write_shards,
)
from megatron_share4v.caption.progress import Progress
from megatron_share4v.caption.records import CaptionRow, CaptionSettings, ImageEntry
from megatron_share4v.exit_codes import ExitCode
from megatron_share4v.infer.answer_log import AnswerIndex, AnswerLog, DPGroup, resume_answer_log
from megatron_share4v.infer.picture_stamps import PictureSource, PictureStamps
from megatron_share4v.logging import get_logger

Captioner = Callable[[Iterator[ImageEntry]], Iterator[list[CaptionRow]]]
SHOWN_ERRORS = 5
SAMPLES_PER_SHARD = 10_000


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Inputs and outputs of a job.

    images: folders, globs, archives and files below images_root. restart: discard earlier results; retry_errors: retry
    failed images.
    """

    save_path: Path
    images_file: Path | None = None
    images: tuple[str, ...] = ()
    images_root: Path = Path()
    jsonl: Path | None = None
    annotations: Path | None = None
    shards: Path | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD
    restart: bool = False
    retry_errors: bool = False

    @property
    def journals(self) -> Path:
        """Directory of the answer logs."""
        return self.save_path.with_name(f"{self.save_path.name}.journal")


@dataclass(frozen=True, kw_only=True)
class JobSummary:
    """Totals of the job; rates are of this run and process."""

    images: int
    captions: int
    errors: int
    trainable: int
    images_per_s: float
    tokens_per_s: float

    @property
    def exit_code(self) -> int:
        """ExitCode.PARTIAL when there are error rows."""
        return ExitCode.PARTIAL if self.errors else ExitCode.OK


def run_job(
    captioner: Captioner, options: JobOptions, *, settings: CaptionSettings, model: str, share: DPGroup
) -> JobSummary | None:
    """Caption the remaining images and write the files. Returns None on all but DP rank 0.

    model: identifies the model in the answer logs, so that captions of different models never mix. Raises DataError.
    """
    pictures = read_image_entries(images_file=options.images_file, images=options.images, root=options.images_root)
    check_targets(annotations=options.annotations, shards=options.shards, pictures=pictures)
    job: dict[str, object] = {"model": model, **vars(settings)}
    entries = {picture.id: picture for picture in pictures}
    stamps = PictureStamps(lambda name: _source(entries.get(name)))
    journal = AnswerLog(options.journals, rank=share.rank)
    try:
        done = resume_answer_log(journal, job=job, row=CaptionRow, share=share, restart=options.restart, stamps=stamps)
        left = [
            picture
            for picture in pictures
            if picture.id not in done or (options.retry_errors and picture.id in done.errors)
        ]
        share.barrier()  # all ranks have read the logs before any appends
        mine = left[share.rank :: share.size]
        before = (len(pictures) - len(left)) // share.size
        progress = Progress(total=before + len(mine), done=before)
        for rows in captioner(stamps.watch(mine)):
            journal.append(rows, stamps=stamps)
            progress.advance(rows)
        get_logger().info(str(progress))
        share.barrier()
    finally:
        journal.close()
        stamps.close()
    if share.rank:
        return None
    index = AnswerIndex(options.journals, job=job, row=CaptionRow, find_changed=done.changed.intersection)
    return _write(options, pictures, settings, index, progress)


def _source(picture: ImageEntry | None) -> PictureSource | None:
    if picture is None:
        return None
    return PictureSource(file=picture.file, offset=picture.offset, size=picture.size)


def _write(
    options: JobOptions,
    pictures: Sequence[ImageEntry],
    settings: CaptionSettings,
    done: AnswerIndex[CaptionRow],
    progress: Progress,
) -> JobSummary:
    """Write all output files from the answer logs; the result does not depend on how often the job was killed."""
    counts: Counter[str] = Counter()
    ids = [picture.id for picture in pictures]
    for row in done.rows(ids):
        counts["errors" if row.error is not None else "captions"] += 1
        counts["trainable"] += is_trainable(row)
        if row.error is not None and counts["errors"] <= SHOWN_ERRORS:
            get_logger().warning("%s: %s", row.path, row.error)
    if counts["errors"]:
        get_logger().warning(
            "%d images have no caption; each has a line with its error in %s",
            counts["errors"],
            options.jsonl or options.journals,
        )
    write_official(options.save_path, done.rows(ids))
    if options.jsonl:
        write_jsonl(options.jsonl, done.rows(ids))
    if options.annotations:
        write_annotations(options.annotations, done.rows(ids), prompt=settings.prompt)
    if options.shards:
        write_shards(
            options.shards,
            done.rows(ids),
            pictures,
            prompt=settings.prompt,
            samples_per_shard=options.samples_per_shard,
        )
    return JobSummary(
        images=len(pictures),
        captions=counts["captions"],
        errors=counts["errors"],
        trainable=counts["trainable"],
        images_per_s=round(progress.images / progress.seconds, 3),
        tokens_per_s=round(progress.tokens / progress.seconds, 1),
    )

"""Preparation of a data set from annotations and images; every record is checked once, here, so training can trust it.

Accepted records become shards, index and dataset.json, published together by a rename; rejected ones are listed in
rejected.jsonl. A killed preparation resumes after its last finished shard and gives the same bytes. validate.py checks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_share4v.data.images.jpeg_damage import CAN_CHECK, NOT_CHECKED
from megatron_share4v.data.prepare.annotations import AnnotationFile, Entry, source_name
from megatron_share4v.data.prepare.duplicates import Duplicates, find_duplicates
from megatron_share4v.data.prepare.image_files import ImageFiles, find_archives, scan_images
from megatron_share4v.data.prepare.options import PrepareOptions
from megatron_share4v.data.prepare.progress import PrepareProgress
from megatron_share4v.data.prepare.record_keys import describe_unread, image_path, name_image_plainly, unread_keys
from megatron_share4v.data.prepare.resume import NO_PATH, PATH_BYTES, REJECTED, Journal
from megatron_share4v.data.prepare.validate import Accepted, RecordValidator, Rejected, validate_all
from megatron_share4v.data.store.index import IN_PLACE, ROW, VERSION, DatasetInfo, ShardFile, SourceCount, write_index
from megatron_share4v.data.store.shards import Member, ShardWriter
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.template import get_template
from megatron_share4v.text.template_format import Template
from megatron_share4v.text.template_tokens import check_special_tokens, marker_ids
from megatron_share4v.text.tokenizer import Tokenizer

MAX_KEY_LENGTH = 64
DUPLICATES = "duplicates.jsonl"
ARCHIVES = "archives"
FIRST_ARCHIVE = 1 << 15  # first temporary shard number of archives used in place

Validator = Callable[[tuple[Entry, bool]], Accepted | Rejected]


@dataclass(frozen=True)
class PrepareSummary:
    """Counts of a finished preparation.

    images: samples with an image. rejected: records by kind of reason. unread: records by key that is not read.
    damaged: JPEGs that decode with lost blocks.
    """

    output: Path
    samples: int
    images: int
    shards: int
    rejected: dict[str, int]
    duplicates: Duplicates
    unread: dict[str, int] = field(default_factory=dict)
    damaged: int = 0

    def __str__(self) -> str:
        refused = (
            f"{sum(self.rejected.values())} records rejected ({_by_kind(self.rejected)}; see {REJECTED})"
            if self.rejected
            else "no record rejected"
        )
        same = str(self.duplicates)
        repeated = (
            f"; {same}" + (f" (see {DUPLICATES})" if self.duplicates.records or self.duplicates.images else "")
            if same
            else ""
        )
        written = f"{self.samples} samples ({self.images} with an image) in {self.shards} shards"
        unread = f"; keys that are not read: {describe_unread(self.unread)}" if self.unread else ""
        damaged = f"; {self.damaged} JPEGs decode with damage (tools/doctor.py data names them)" if self.damaged else ""
        return f"{self.output}: {written}; {refused}{damaged}{repeated}{unread}"


def prepare(options: PrepareOptions, *, validator: Validator | None = None) -> PrepareSummary:
    """Write the data set, resuming an unfinished preparation.

    validator: replaces RecordValidator in benchmarks. Raises DataError (ConfigError for an unknown template) when there
    is nothing to prepare, when the output exists, or when more than `max_rejected_fraction` of the records are
    rejected; their list is kept in that case.
    """
    if not CAN_CHECK:
        get_logger().warning(NOT_CHECKED)
    tokenizer = load_tokenizer(options.tokenizer, rule=options.tokenizer_rule)
    template = get_template(options.template, options.trained_markers)
    check_special_tokens(template, tokenizer)
    marker_ids(template, tokenizer)
    if not options.images.is_dir():
        raise DataError(
            f"images {options.images}: not a folder; give the folder that the records' 'image' paths are relative to"
        )
    if (
        options.output.exists()
        and (not options.output.is_dir() or any(options.output.iterdir()))
        and not options.overwrite
    ):
        raise DataError(
            f"output {options.output}: exists and is not empty; choose another directory or pass --overwrite"
        )
    get_logger().info("tokenizer %s: %s", options.tokenizer, tokenizer.summary())
    annotations = AnnotationFile(options.annotations)
    staging = options.output.parent / f".{options.output.name}.partial"
    journal = Journal.open(
        staging, identity=_identity(options, annotations, tokenizer, template), restart=options.restart
    )
    try:
        images = scan_images(options.images, table=staging / ARCHIVES, in_place=options.in_place)
        default_validator = RecordValidator(
            images, tokenizer, template, options.max_text_length, keep_bytes=not options.in_place
        )
        writer = _Writer(
            journal,
            samples_per_shard=options.samples_per_shard,
            in_place=options.in_place,
            repeat_images=options.repeat_images,
        )
        _write_samples(annotations, validator or default_validator, writer, workers=options.workers)
        _refuse_too_many(journal, options=options)
        summary = _finish(journal, options=options, tokenizer=tokenizer, template=template, images=images)
    finally:
        journal.close()
    _publish(staging, options.output)
    return summary


def _identity(
    options: PrepareOptions, annotations: AnnotationFile, tokenizer: Tokenizer, template: Template
) -> dict[str, object]:
    """Properties that must match to resume an unfinished preparation."""
    return {
        "version": VERSION,
        "annotations": str(options.annotations.resolve()),
        "annotations_size": annotations.size,
        "annotations_changed_ns": options.annotations.stat().st_mtime_ns,
        "images": str(options.images.resolve()),
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_rule": tokenizer.rule,
        "template": template.name,
        "trained_markers": template.trained_markers,
        "max_text_length": options.max_text_length,
        "samples_per_shard": options.samples_per_shard,
        "in_place": options.in_place,
        # Written rows refer to archives by number.
        "archives": [[str(path), path.stat().st_size] for path in find_archives(options.images)]
        if options.in_place
        else [],
        "repeat_images": options.repeat_images,
    }


def _write_samples(annotations: AnnotationFile, validate: Validator, writer: _Writer, *, workers: int) -> None:
    journal = writer.journal
    if journal.entries:
        get_logger().info(f"resuming after {journal.entries} records, {len(journal.shards)} finished shards")
    entries = islice(annotations, journal.entries, None)
    requests = ((entry, writer.has_image(entry)) for entry in entries)
    progress = PrepareProgress(annotations, done=journal.entries)
    for (entry, _), verdict in validate_all(validate, requests, workers=workers):
        if isinstance(verdict, Rejected):
            writer.reject(entry, verdict)
        else:
            writer.accept(entry, verdict)
        progress.advance(rejected=journal.rejected.total())
    writer.close()
    progress.report(rejected=journal.rejected.total())


class _Writer:
    """Writer of verdicts, in annotation order, to shards and journal."""

    def __init__(self, journal: Journal, *, samples_per_shard: int, in_place: bool, repeat_images: bool) -> None:
        self.journal = journal
        self._shards = ShardWriter(journal.directory, samples_per_shard=samples_per_shard, first=len(journal.shards))
        self._in_place, self._repeat_images = in_place, repeat_images
        self._used_keys = set(journal.keys)
        self._owners: dict[bytes, int] = {}  # hash of an image's path -> first sample with it
        for row, path in enumerate(journal.rows["path"]):
            self._owners.setdefault(path.tobytes(), row)

    def has_image(self, entry: Entry) -> bool:
        """Whether the image of an entry is stored already and need not be validated."""
        path = image_path(entry.content)
        return path is not None and not self._repeat_images and _path_hash(path) in self._owners

    def accept(self, entry: Entry, sample: Accepted) -> None:
        """Write one sample.

        An image that an earlier sample has is not stored again: the text names the shard and key that hold it.
        """
        source, key = source_name(entry.content), self._new_key(sample.id, entry.position)
        path = _path_hash(sample.image_path) if sample.image_path is not None else NO_PATH
        owner = self._owners.get(path) if path != NO_PATH and not self._repeat_images else None
        assert isinstance(entry.content, dict)  # accepted records are objects
        content = name_image_plainly(entry.content, sample.image_path)
        if owner is not None and not self._in_place:
            content = content | {
                "image_in": {
                    "shard": self._shards.names[self.journal.rows[owner]["shard"]],
                    "key": self.journal.keys[owner],
                }
            }
        image = sample.image if owner is None else None
        location = self._shards.write(
            key,
            text=json.dumps(content).encode("ascii"),
            image=image.data if image else b"",
            extension=image.header.extension if image else "",
        )
        if owner is not None:
            image_place, width, height = self._place_of(owner)
        else:
            image_place = self._new_place(sample, location.shard, location.image)
            width, height = (image.header.width, image.header.height) if image else (0, 0)
        text, n_img = sample.text, int(sample.image_path is not None)
        text_place = (location.text.offset, location.text.length, location.text.crc32)
        counts = (width, height, n_img, text.words, text.n_tok, text.n_lab, 0)
        if image:
            self.journal.damaged += bool(image.damage)
            self._owners.setdefault(path, len(self.journal.keys))
        self.journal.add(key, (location.shard, *image_place, *text_place, *counts, text.identity, path))
        self.journal.sources.update({(source, "samples"): 1, (source, "images"): int(image is not None)})
        self._advance(entry)

    def reject(self, entry: Entry, verdict: Rejected) -> None:
        """List one rejected record."""
        content = entry.content if isinstance(entry.content, dict) else {}
        self.journal.reject(
            {
                "position": entry.position,
                "id": content.get("id"),
                "image": image_path(content) or content.get("image"),
                **dataclasses.asdict(verdict),
            }
        )
        self.journal.sources[source_name(entry.content), "rejected"] += 1
        self._advance(entry)

    def close(self) -> None:
        """Finish the last shard."""
        if not self._shards.is_closed:
            self._finish_shard()

    def _advance(self, entry: Entry) -> None:
        self.journal.entries = entry.position + 1
        self.journal.unread.update(set(unread_keys(entry.content)))
        if self._shards.is_full:
            self._finish_shard()

    def _finish_shard(self) -> None:
        self._shards.close()
        name = self._shards.names[-1]
        self.journal.commit(ShardFile(name=name, size=(self.journal.directory / name).stat().st_size))

    def _place_of(self, owner: int) -> tuple[tuple[int, ...], int, int]:
        row = self.journal.rows[owner]
        place = tuple(int(row[name]) for name in ("image_shard", "image_offset", "image_length", "image_crc32"))
        return place, int(row["width"]), int(row["height"])

    def _new_place(self, sample: Accepted, shard: int, member: Member) -> tuple[int, int, int, int]:
        """image_shard, offset, length, crc32 of an image that no earlier sample has."""
        if sample.image is None or not self._in_place:
            return shard, member.offset, member.length, member.crc32
        where = IN_PLACE if sample.image.archive is None else FIRST_ARCHIVE + sample.image.archive
        return where, sample.image.offset, sample.image.length, sample.image.crc32

    def _new_key(self, record_id: str, position: int) -> str:
        """Id made valid as a file name; "~position" distinguishes repeated ids (published files do repeat ids)."""
        key = re.sub(r"[^A-Za-z0-9_-]", "_", record_id)[:MAX_KEY_LENGTH]
        if not key or key in self._used_keys:
            key = f"{key}~{position}"
        self._used_keys.add(key)
        return key


def _refuse_too_many(journal: Journal, *, options: PrepareOptions) -> None:
    """Raise DataError when too many records were rejected, keeping their list.

    The staging folder is removed: the records must be validated anew.
    """
    total, refused = journal.entries, journal.rejected.total()
    if not total:
        journal.close()
        shutil.rmtree(journal.directory)
        raise DataError(f"annotations {options.annotations}: holds no records; nothing to prepare")
    if journal.keys and refused / total <= options.max_rejected_fraction:
        return
    kept = options.output.parent / f"{options.output.name}.{REJECTED}"
    journal.close()
    os.replace(journal.directory / REJECTED, kept)
    shutil.rmtree(journal.directory)
    raise DataError(
        f"annotations {options.annotations}: {refused} of {total} records are bad "
        f"({refused / total:.1%}: {_by_kind(journal.rejected)}), more than "
        f"--max-rejected-fraction {options.max_rejected_fraction}; nothing was published. "
        f"Each is listed with its reason in {kept}"
    )


def _finish(
    journal: Journal, *, options: PrepareOptions, tokenizer: Tokenizer, template: Template, images: ImageFiles
) -> PrepareSummary:
    """Write index, description and list of duplicates, which completes the directory."""
    kept, shards = journal.rows, tuple(journal.shards)
    rows = np.empty(len(kept), dtype=ROW)
    for name in ROW.fields or ():
        rows[name] = kept[name]
    if options.in_place:
        is_archive = (rows["image_shard"] >= FIRST_ARCHIVE) & (rows["image_shard"] != IN_PLACE)
        rows["image_shard"][is_archive] -= FIRST_ARCHIVE - len(shards)
        archives = [(images.root / name).resolve() for name in images.archives]
        shards += tuple(ShardFile(name=str(path), size=path.stat().st_size) for path in archives)
    info = DatasetInfo(
        samples=len(rows),
        shards=shards,
        index_sha256="",
        keys_sha256="",
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_rule=tokenizer.rule,
        template=template.name,
        trained_markers=template.trained_markers,
        max_text_length=options.max_text_length,
        sources=_source_counts(journal),
        images_root=str(options.images.resolve()) if options.in_place else None,
    )
    write_index(journal.directory, rows=rows, keys=np.array(journal.keys, dtype=np.bytes_), info=info)
    path = np.frombuffer(kept["path"].tobytes(), dtype="u1").reshape(-1, PATH_BYTES)[:, :8].copy().view("<u8")[:, 0]
    duplicates = find_duplicates(
        identity=kept["identity"],
        path=path,
        n_img=rows["n_img"],
        length=rows["image_length"],
        crc32=rows["image_crc32"],
    )
    duplicates.write(journal.directory / DUPLICATES, keys=journal.keys)
    if (journal.directory / ARCHIVES).is_dir():
        shutil.rmtree(journal.directory / ARCHIVES)
    journal.remove()
    images_used, unread = int(rows["n_img"].sum()), dict(journal.unread)
    return PrepareSummary(
        options.output,
        len(rows),
        images_used,
        len(journal.shards),
        dict(journal.rejected),
        duplicates,
        unread,
        journal.damaged,
    )


def _source_counts(journal: Journal) -> dict[str, SourceCount]:
    names = sorted({name for name, _ in journal.sources})
    counts = journal.sources
    return {
        name: SourceCount(
            samples=counts[name, "samples"], rejected=counts[name, "rejected"], images=counts[name, "images"]
        )
        for name in names
    }


def _by_kind(rejected: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(rejected.items()))


def _path_hash(path: str) -> bytes:
    return hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=PATH_BYTES).digest()


def _publish(staging: Path, output: Path) -> None:
    """Rename `staging` to `output`; the previous output is removed after the new data set is in place."""
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    if output.exists():
        os.replace(output, old)
    os.replace(staging, output)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()

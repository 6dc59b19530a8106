"""Looks at every record of an annotation file or a prepared data set before a run is started, and names what is wrong. Writes nothing.

The verdicts are those of validate.py; what they add up to is put into words by audit_report.py.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_share4v.data.prepare.annotations import AnnotationFile, Entry, parse_record, source_name
from megatron_share4v.data.prepare.duplicates import Duplicates, find_duplicates
from megatron_share4v.data.prepare.growing_array import GrowingArray
from megatron_share4v.data.prepare.image_files import EncodedImage
from megatron_share4v.data.prepare.validate import (
    Accepted,
    CheckedText,
    RecordValidator,
    Rejected,
    check_image,
    validate_all,
)
from megatron_share4v.data.records import Sample
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.data.store.shards import Member, ShardReader
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

DAMAGED, OUTDATED, TRUNCATED, STRAY = (
    "damaged sample",
    "outdated index",
    "truncated answer",
    "placeholder without image",
)
SAME_ID, SAME_RECORD, SAME_IMAGE = "repeated id", "repeated record", "equal images"
AUDIT_KINDS = (DAMAGED, OUTDATED, TRUNCATED, STRAY, SAME_ID, SAME_RECORD, SAME_IMAGE)
UNREADABLE = "(unreadable)"  # in place of the source of a sample whose record cannot be read
PROGRESS_EVERY_S = 5.0

FACTS = np.dtype(
    [
        ("position", "<u4"),
        ("source", "<u2"),
        ("n_img", "u1"),
        ("words", "<i4"),
        ("n_tok", "<u4"),
        ("n_lab", "<u4"),
        ("full_tok", "<u4"),
        ("full_lab", "<u4"),
        ("identity", "<u8"),
        ("path", "<u8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; `where` names the record."""

    kind: str
    where: str
    reason: str


@dataclass(frozen=True)
class AuditedRecord:
    """What a worker says about one record. stray: it has a placeholder and no image. outdated: how the index differs, if it does."""

    where: str
    id: str
    source: str
    verdict: Accepted | Rejected
    image_path: str = ""
    stray: bool = False
    outdated: str = ""


class RecordSource(Protocol):
    """Where records come from; can be sent to a worker."""

    @property
    def examine(self) -> RecordValidator: ...

    def items(self) -> Iterator[object]: ...

    def look(self, item: object) -> AuditedRecord: ...

    def sample(self, item: object) -> Sample: ...

    def name(self, position: int) -> str: ...


@dataclass(frozen=True)
class AnnotationSource:
    """The records of an annotation file with a folder of images."""

    annotations: AnnotationFile
    examine: RecordValidator

    def items(self) -> Iterator[Entry]:
        """In the order of the file."""
        return iter(self.annotations)

    def look(self, entry: Entry) -> AuditedRecord:
        """Examine one record."""
        verdict = self.examine((entry, False))
        content = entry.content if isinstance(entry.content, dict) else {}
        path, stray = content.get("image"), False
        if isinstance(verdict, Accepted) and verdict.image_path is None:
            stray = any(IMAGE_PLACEHOLDER in turn.text for turn in parse_record(content, where=entry.where).turns)
        return AuditedRecord(
            entry.where,
            str(content.get("id") or ""),
            source_name(content),
            verdict,
            path if isinstance(path, str) else "",
            stray,
        )

    def sample(self, entry: Entry) -> Sample:
        """An accepted record with its image."""
        record = parse_record(entry.content, where=entry.where)
        image = self.examine.images.read(record.image).data if record.image is not None else None
        return Sample(key=record.id, turns=record.turns, image=image, has_image=image is not None, shard=entry.file)

    def name(self, position: int) -> str:
        """What findings call a record."""
        return f"record {position}"


@dataclass(frozen=True)
class DatasetSource:
    """The samples of a prepared data set: its bytes are checked too."""

    store: SampleReader
    examine: RecordValidator

    def items(self) -> Iterator[int]:
        """Row numbers."""
        return iter(range(len(self.store.index)))

    def look(self, row: int) -> AuditedRecord:
        """Read, verify and examine one sample."""
        index = self.store.index
        key, shards = index.key(row), tuple(shard.name for shard in index.info.shards)
        where = f"{shards[index.rows[row]['shard']]}:{key}"
        try:
            content = _content(index, row, shards, key=key)
            sample = self.store.read(row, with_image=True)
        except DataError as error:
            return AuditedRecord(where, "", UNREADABLE, Rejected(DAMAGED, str(error)))
        image = check_image(EncodedImage(sample.image), keep_bytes=False) if sample.has_image else None
        text = self.examine.check_text(sample.turns, has_image=sample.has_image)
        verdict = next((v for v in (image, text) if isinstance(v, Rejected)), None) or Accepted(
            key, content.get("image"), image, text
        )
        stray = not sample.has_image and any(IMAGE_PLACEHOLDER in turn.text for turn in sample.turns)
        outdated = "" if isinstance(verdict, Rejected) else _differences(index.rows[row], verdict.text)
        return AuditedRecord(
            where,
            str(content.get("id") or ""),
            source_name(content),
            verdict,
            content.get("image") or "",
            stray,
            outdated,
        )

    def sample(self, row: int) -> Sample:
        """A sample with its image."""
        return self.store.read(row, with_image=True)

    def name(self, position: int) -> str:
        """What findings call a sample."""
        return self.store.index.key(position)


@dataclass
class AuditResult:
    """What was found. records: looked at. counts: by kind; examples: the first findings of each kind. sources: names, FACTS holds numbers.

    refused: records of each source that cannot be trained. chosen: positions and items of a random sample of the accepted.
    """

    records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    chosen: list[tuple[int, object]] = field(default_factory=list)
    duplicates: Duplicates | None = None
    facts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=FACTS))


def audit_records(
    records: RecordSource,
    *,
    workers: int,
    choose: int = 0,
    on_finding: Callable[[Finding], None] | None = None,
    examples: int = 3,
) -> AuditResult:
    """Look at all records. on_finding is called with each finding. choose: how many accepted records to pick at random, always the same."""
    result, collector = AuditResult(), _Collector(on_finding, examples)
    table, ids, numbers = GrowingArray(FACTS), GrowingArray(np.dtype([("id", "<u8"), ("position", "<u4")])), {}
    heap: list[tuple[int, int, object]] = []
    last = started = time.monotonic()
    for position, (item, seen) in enumerate(validate_all(records.look, records.items(), workers=workers)):
        result.records += 1
        source = numbers.setdefault(seen.source, len(numbers))
        if seen.id:
            ids.append((_hash(seen.id), position))
        if isinstance(seen.verdict, Rejected):
            result.refused[seen.source] += 1
            collector.add(seen.verdict.kind, seen.where, seen.verdict.reason)
        else:
            table.append(_facts(position, source, seen))
            for kind, reason in _remarks(seen):
                collector.add(kind, seen.where, reason)
            # The smallest hashes of the positions are a random sample, without the number of records being known.
            entry = (-_hash(str(position)), position, item)
            if choose and (len(heap) < choose or entry > heap[0]):
                (heapq.heappush if len(heap) < choose else heapq.heapreplace)(heap, entry)
        if time.monotonic() - last >= PROGRESS_EVERY_S:
            last = time.monotonic()
            rate = result.records / (last - started)
            get_logger().info(
                f"looked at {result.records} records, {rate:.0f} records/s, {collector.counts.total()} findings"
            )
    result.facts, result.sources = table.rows, list(numbers)
    result.duplicates = _find_repeats(records, result.facts, ids.rows, collector)
    result.chosen = [(position, item) for _, position, item in sorted(heap, key=lambda entry: entry[1])]
    result.counts, result.examples = collector.counts, collector.examples
    return result


@dataclass
class _Collector:
    """Counts findings, keeps the first of each kind, and passes all on."""

    on_finding: Callable[[Finding], None] | None
    most_examples: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, kind: str, where: str, reason: str) -> None:
        """One finding more."""
        finding = Finding(kind, where, reason)
        self.counts[kind] += 1
        if self.counts[kind] <= self.most_examples:
            self.examples.setdefault(kind, []).append(finding)
        if self.on_finding:
            self.on_finding(finding)


def _remarks(seen: AuditedRecord) -> Iterator[tuple[str, str]]:
    """What is odd about an accepted record."""
    text = seen.verdict.text
    if seen.outdated:
        yield OUTDATED, f"{seen.outdated}; prepare the data set again"
    if text.full_lab > text.n_lab:
        yield (
            TRUNCATED,
            (
                f"{text.full_lab - text.n_lab} of {text.full_lab} trained positions are cut away: {text.full_tok} positions, kept are {text.n_tok}"
            ),
        )
    if seen.stray:
        yield (
            STRAY,
            f"a turn has {IMAGE_PLACEHOLDER} and the record has no image: it is trained as text; give the image or remove it",
        )


def _facts(position: int, source: int, seen: AuditedRecord) -> tuple[int, ...]:
    text, image = seen.verdict.text, seen.verdict.image
    of_image = (
        (_hash(seen.image_path), image.length, image.crc32, image.header.width, image.header.height)
        if image
        else (0, 0, 0, 0, 0)
    )
    counts = (text.words, text.n_tok, text.n_lab, text.full_tok, text.full_lab, text.identity)
    return position, source, int(image is not None), *counts, *of_image


def _find_repeats(records: RecordSource, facts: np.ndarray, ids: np.ndarray, collector: _Collector) -> Duplicates:
    """Repeated ids, records and images, as findings."""
    order = np.lexsort((ids["position"], ids["id"]))
    repeated = np.flatnonzero(ids["id"][order][1:] == ids["id"][order][:-1]) + 1
    for position in sorted(ids["position"][order][repeated].tolist()):
        collector.add(
            SAME_ID, records.name(position), "an earlier record has the same id; its key will be <id>~<position>"
        )
    columns = {name: facts[name] for name in ("identity", "path", "n_img", "length", "crc32")}
    duplicates = find_duplicates(**columns)
    for kind, groups, what in (
        (SAME_RECORD, duplicates.records, "the same conversation about the same image as"),
        (SAME_IMAGE, duplicates.images, "the same image bytes, under another path, as"),
    ):
        for first, *others in groups:
            for row in others:
                name = records.name(int(facts["position"][row]))
                collector.add(kind, name, f"{what} {records.name(int(facts['position'][first]))}")
    return duplicates


def _content(index: Index, row: int, shards: tuple[str, ...], *, key: str) -> dict[str, object]:
    """The record as it was annotated."""
    entry = index.rows[row]
    member = Member(offset=int(entry["text_offset"]), length=int(entry["text_length"]), crc32=int(entry["text_crc32"]))
    reader = ShardReader(index.directory, shards)
    try:
        return json.loads(reader.read(int(entry["shard"]), member, key=key))
    finally:
        reader.close()


def _differences(entry: np.void, text: CheckedText) -> str:
    ours = {"words": text.words, "n_tok": text.n_tok, "n_lab": text.n_lab}
    return ", ".join(
        f"{name} is {value}, the index says {int(entry[name])}" for name, value in ours.items() if value != entry[name]
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")

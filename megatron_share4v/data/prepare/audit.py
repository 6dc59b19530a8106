"""Audit of every record of an annotation file or a prepared data set, before a run is started. Writes nothing.

Records are judged by validate.py; audit_report.py formats the result.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_share4v.data.prepare.annotations import AnnotationFile, Entry, parse_record, source_name
from megatron_share4v.data.prepare.duplicates import Duplicates, find_duplicates
from megatron_share4v.data.prepare.growing_array import GrowingArray
from megatron_share4v.data.prepare.image_files import EncodedImage
from megatron_share4v.data.prepare.record_keys import image_path, unread_keys
from megatron_share4v.data.prepare.validate import (
    Accepted,
    CheckedText,
    RecordValidator,
    Rejected,
    check_image,
    check_text_only,
    validate_all,
)
from megatron_share4v.data.records import Sample
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.data.store.shards import Member, ShardReader
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger

DAMAGED, OUTDATED, TRUNCATED, LOST = "damaged sample", "outdated index", "truncated answer", "damaged JPEG"
SAME_ID, SAME_RECORD, SAME_IMAGE = "repeated id", "repeated record", "equal images"
AUDIT_KINDS = (DAMAGED, OUTDATED, TRUNCATED, LOST, SAME_ID, SAME_RECORD, SAME_IMAGE)
INFORMATION = (SAME_ID, SAME_RECORD, SAME_IMAGE)
"""Kinds that are reported and are no failure: nothing is lost or trained wrongly."""
UNREADABLE = "(unreadable)"  # source name of samples whose record cannot be read
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
    """One problem; `where` names the record."""

    kind: str
    where: str
    reason: str


@dataclass(frozen=True)
class AuditedRecord:
    """Result of auditing one record in a worker.

    unread: keys of the record that are not read. outdated: differences to the index, if any.
    """

    where: str
    id: str
    source: str
    verdict: Accepted | Rejected
    image_path: str = ""
    unread: tuple[str, ...] = ()
    outdated: str = ""


class RecordSource(Protocol):
    """Source of the records to audit; can be pickled to a worker."""

    @property
    def validator(self) -> RecordValidator:
        """Validator with the settings of the run."""

    def items(self) -> Iterator[Any]:
        """Iterate over the items to audit."""

    def audit_item(self, item: Any) -> AuditedRecord:
        """Read and validate one item."""

    def sample(self, item: Any) -> Sample:
        """Load an accepted item with its image."""

    def name(self, position: int) -> str:
        """Name of the record at `position`, for findings."""


@dataclass(frozen=True)
class AnnotationSource:
    """Records of an annotation file with an image folder."""

    annotations: AnnotationFile
    validator: RecordValidator

    def items(self) -> Iterator[Entry]:
        """Iterate over the entries in file order."""
        return iter(self.annotations)

    def audit_item(self, entry: Entry) -> AuditedRecord:
        """Validate one record."""
        verdict = self.validator((entry, False))
        content = entry.content if isinstance(entry.content, dict) else {}
        return AuditedRecord(
            entry.where,
            str(content.get("id") or ""),
            source_name(content),
            verdict,
            image_path(content) or "",
            tuple(dict.fromkeys(unread_keys(content))),
        )

    def sample(self, entry: Entry) -> Sample:
        """Load an accepted record with its image."""
        record = parse_record(entry.content, where=entry.where)
        image = self.validator.images.read(record.image).data if record.image is not None else None
        return Sample(key=record.id, turns=record.turns, image=image, has_image=image is not None, shard=entry.file)

    def name(self, position: int) -> str:
        """Name of the record at `position`, for findings."""
        return f"record {position}"


@dataclass(frozen=True)
class DatasetSource:
    """Samples of a prepared data set; their bytes are verified as well."""

    store: SampleReader
    validator: RecordValidator

    def items(self) -> Iterator[int]:
        """Iterate over the row numbers."""
        return iter(range(len(self.store.index)))

    def audit_item(self, row: int) -> AuditedRecord:
        """Read, verify and validate one sample."""
        index = self.store.index
        key, shards = index.key(row), tuple(shard.name for shard in index.info.shards)
        where = f"{shards[index.rows[row]['shard']]}:{key}"
        try:
            content = _content(index, row, shards, key=key)
            sample = self.store.read(row, with_image=True)
        except DataError as error:
            return AuditedRecord(where, "", UNREADABLE, Rejected(DAMAGED, str(error)))
        image = check_image(EncodedImage(sample.image), keep_bytes=False) if sample.image is not None else None
        text = self.validator.check_text(sample.turns, has_image=sample.has_image)
        lost = None if sample.has_image else check_text_only(content, sample.turns, where=where)
        verdict: Accepted | Rejected
        if isinstance(image, Rejected):
            verdict = image
        elif lost is not None:
            verdict = lost
        else:
            verdict = text if isinstance(text, Rejected) else Accepted(key, image_path(content), image, text)
        outdated = "" if isinstance(verdict, Rejected) else _differences(index.rows[row], verdict.text)
        return AuditedRecord(
            where,
            str(content.get("id") or ""),
            source_name(content),
            verdict,
            image_path(content) or "",
            tuple(dict.fromkeys(unread_keys(content))),
            outdated,
        )

    def sample(self, row: int) -> Sample:
        """Load an accepted sample with its image."""
        return self.store.read(row, with_image=True)

    def name(self, position: int) -> str:
        """What findings call a sample."""
        return self.store.index.key(position)


@dataclass
class AuditResult:
    """Result of an audit.

    records: number of audited records. counts: findings by kind; examples: the first findings of each kind.
    sources: source names, numbered as in `facts` ([N] of FACTS). refused: rejected records by source.
    chosen: (position, item) of a random sample of the accepted records. unread: records by key that is not read.
    """

    records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    chosen: list[tuple[int, object]] = field(default_factory=list)
    duplicates: Duplicates | None = None
    unread: Counter[str] = field(default_factory=Counter)
    facts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=FACTS))


def audit_records(
    records: RecordSource,
    *,
    workers: int,
    choose: int = 0,
    on_finding: Callable[[Finding], None] | None = None,
    examples: int = 3,
) -> AuditResult:
    """Audit all records.

    on_finding: called with each finding. choose: number of accepted records to pick at random, reproducibly.
    examples: findings kept per kind.
    """
    result, collector = AuditResult(), _FindingCollector(on_finding, examples)
    table, ids = GrowingArray(FACTS), GrowingArray(np.dtype([("id", "<u8"), ("position", "<u4")]))
    numbers: dict[str, int] = {}
    heap: list[tuple[int, int, object]] = []
    last = started = time.monotonic()
    for position, (item, record) in enumerate(validate_all(records.audit_item, records.items(), workers=workers)):
        result.records += 1
        result.unread.update(record.unread)
        source = numbers.setdefault(record.source, len(numbers))
        if record.id:
            ids.append((_hash(record.id), position))
        if isinstance(record.verdict, Rejected):
            result.refused[record.source] += 1
            collector.add(record.verdict.kind, record.where, record.verdict.reason)
        else:
            table.append(_facts(position, source, record, record.verdict))
            for kind, reason in _warnings(record, record.verdict):
                collector.add(kind, record.where, reason)
            # The smallest position hashes are a random sample; the number of records need not be known.
            entry = (-_hash(str(position)), position, item)
            if choose and (len(heap) < choose or entry > heap[0]):
                (heapq.heappush if len(heap) < choose else heapq.heapreplace)(heap, entry)
        if time.monotonic() - last >= PROGRESS_EVERY_S:
            last = time.monotonic()
            rate = result.records / (last - started)
            get_logger().info(
                f"audited {result.records} records, {rate:.0f} records/s, {collector.counts.total()} findings"
            )
    result.facts, result.sources = table.rows, list(numbers)
    result.duplicates = _find_repeats(records, result.facts, ids.rows, collector)
    result.chosen = [(position, item) for _, position, item in sorted(heap, key=lambda entry: entry[1])]
    result.counts, result.examples = collector.counts, collector.examples
    return result


@dataclass
class _FindingCollector:
    """Counter of findings; keeps the first of each kind and forwards all."""

    on_finding: Callable[[Finding], None] | None
    most_examples: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, kind: str, where: str, reason: str) -> None:
        """Record one finding."""
        finding = Finding(kind, where, reason)
        self.counts[kind] += 1
        if self.counts[kind] <= self.most_examples:
            self.examples.setdefault(kind, []).append(finding)
        if self.on_finding:
            self.on_finding(finding)


def _warnings(record: AuditedRecord, verdict: Accepted) -> Iterator[tuple[str, str]]:
    """Yield the warnings about an accepted record."""
    text = verdict.text
    if verdict.image and verdict.image.damage:
        yield LOST, f"the picture decodes with damage (libjpeg: {verdict.image.damage}); fetch the file again"
    if record.outdated:
        yield OUTDATED, f"{record.outdated}; prepare the data set again"
    if text.full_lab > text.n_lab:
        yield (
            TRUNCATED,
            (
                f"{text.full_lab - text.n_lab} of {text.full_lab} trained positions are truncated: "
                f"{text.n_tok} of {text.full_tok} positions are kept"
            ),
        )


def _facts(position: int, source: int, record: AuditedRecord, verdict: Accepted) -> tuple[int, ...]:
    """Row of FACTS of an accepted record."""
    text, image = verdict.text, verdict.image
    of_image = (
        (_hash(record.image_path), image.length, image.crc32, image.header.width, image.header.height)
        if image
        else (0, 0, 0, 0, 0)
    )
    counts = (text.words, text.n_tok, text.n_lab, text.full_tok, text.full_lab, text.identity)
    return position, source, int(image is not None), *counts, *of_image


def _find_repeats(
    records: RecordSource, facts: np.ndarray, ids: np.ndarray, collector: _FindingCollector
) -> Duplicates:
    """Report repeated ids, records and images as findings."""
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


def _content(index: Index, row: int, shards: tuple[str, ...], *, key: str) -> dict[str, Any]:
    """Annotated record of a row, as JSON."""
    entry = index.rows[row]
    member = Member(offset=int(entry["text_offset"]), length=int(entry["text_length"]), crc32=int(entry["text_crc32"]))
    reader = ShardReader(index.directory, shards)
    try:
        return json.loads(reader.read(int(entry["shard"]), member, key=key))
    finally:
        reader.close()


def _differences(entry: np.void, text: CheckedText) -> str:
    """Differences between a text and its index row."""
    computed = {"words": text.words, "n_tok": text.n_tok, "n_lab": text.n_lab}
    return ", ".join(
        f"{name} is {value}, {int(entry[name])} in the index"
        for name, value in computed.items()
        if value != entry[name]
    )


def _hash(text: str) -> int:
    """64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")

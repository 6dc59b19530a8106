"""Annotations and images to a prepared data set: every record is checked once, here, so that training can trust what it reads.

Good records become shards, index and dataset.json, published together by a rename; bad ones are named in rejected.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_share4v.data.decode_pil import ImageHeader, inspect
from megatron_share4v.data.encode import check_placeholders, trained_positions
from megatron_share4v.data.index import ROW, DatasetInfo, ShardFile, SourceCount, write_index
from megatron_share4v.data.shards import Location, ShardWriter
from megatron_share4v.data.sources import Entry, parse_record, read_entries, source_of, word_count
from megatron_share4v.data.workers import ordered_map
from megatron_share4v.errors import DataError
from megatron_share4v.log import get_logger
from megatron_share4v.text.mask import encode_conversation
from megatron_share4v.text.template import Template, get_template
from megatron_share4v.text.tokenizer import Tokenizer

PROGRESS_EVERY_S = 5.0
MAX_KEY_LENGTH = 64
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare. max_text_length: positions kept per sample, an image counted as one. workers 0: in this process."""

    annotations: Path
    images: Path
    output: Path
    tokenizer: Path
    template: str = "vicuna_v1"
    max_text_length: int = 2048
    samples_per_shard: int = 10_000
    max_rejected_fraction: float = 0.05
    workers: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class PrepareSummary:
    """What was written. rejected: how many records were refused, by kind of reason."""

    output: Path
    samples: int
    images: int
    shards: int
    rejected: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(self.rejected.items()))
        refused = f"{sum(self.rejected.values())} records rejected ({reasons}; see {REJECTED})" if reasons else "no record rejected"
        return f"{self.output}: {self.samples} samples ({self.images} with an image) in {self.shards} shards; {refused}"


def prepare(options: PrepareOptions) -> PrepareSummary:
    """Write the data set. Raises DataError (ConfigError for an unknown template) when there is nothing to prepare, when the output is in
    the way, or when more than `max_rejected_fraction` of the records are bad; the list of those is kept in the last case.
    """
    tokenizer, template = Tokenizer(options.tokenizer), get_template(options.template)
    if not options.images.is_dir():
        raise DataError(f"images {options.images}: not a folder; give the folder that the records' 'image' paths are relative to")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())) and not options.overwrite:
        raise DataError(f"output {options.output}: exists and is not empty; choose another directory or pass --overwrite")
    entries = read_entries(options.annotations)
    if not entries:
        raise DataError(f"annotations {options.annotations}: holds no records; nothing to prepare")
    examine = _Examine(images=options.images, tokenizer=tokenizer, template=template, max_text_length=options.max_text_length)
    with _staging(options.output) as staging:
        writer = _Writer(staging, samples_per_shard=options.samples_per_shard)
        progress = _Progress(total=len(entries))
        for entry, outcome in zip(entries, ordered_map(examine, entries, num_workers=options.workers, prefetch=16)):
            writer.add(entry, outcome)
            progress.advance(rejected=writer.num_rejected)
        writer.close()
        _refuse_too_many(writer, staging, options=options, total=len(entries))
        info = DatasetInfo(
            samples=len(writer.rows),
            shards=tuple(ShardFile(name=name, size=(staging / name).stat().st_size) for name in writer.shards.names),
            index_sha256="",
            keys_sha256="",
            tokenizer_fingerprint=tokenizer.fingerprint,
            template=template.name,
            max_text_length=options.max_text_length,
            sources=writer.source_counts(),
        )
        write_index(staging, rows=np.array(writer.rows, dtype=ROW), keys=np.array(writer.keys, dtype=np.bytes_), info=info)
        _publish(staging, options.output)
    images = int(sum(row[ROW.names.index("n_img")] for row in writer.rows))
    return PrepareSummary(options.output, len(writer.rows), images, len(writer.shards.names), dict(writer.rejected))


@dataclass(frozen=True)
class _Accepted:
    """A good record and what the index will say about it; `image` is the file as it was found."""

    id: str
    image: bytes
    header: ImageHeader | None
    words: int
    n_tok: int
    n_lab: int


@dataclass(frozen=True)
class _Rejected:
    """kind: which check refused the record; reason: the message."""

    kind: str
    reason: str


@dataclass(frozen=True)
class _Examine:
    """Entry -> verdict; what a worker runs."""

    images: Path
    tokenizer: Tokenizer
    template: Template
    max_text_length: int

    def __call__(self, entry: Entry) -> _Accepted | _Rejected:
        kind = "bad record"
        try:
            record = parse_record(entry.content, where=entry.where)
            data, header = b"", None
            if record.image is not None:
                kind = "missing image"
                data = _read_image(self.images / record.image)
                kind = "corrupt image"
                header = inspect(data)
            kind = "bad conversation"
            has_image = record.image is not None
            encoded = encode_conversation(self.tokenizer, self.template, record.turns, has_image=has_image, max_length=self.max_text_length)
            check_placeholders(torch.as_tensor(encoded.input_ids), images=int(has_image))
            kind = "no label"
            n_lab = trained_positions(torch.as_tensor(encoded.labels))
            if not n_lab:
                raise DataError(f"nothing to train: no answer within the first {self.max_text_length} positions")
        except DataError as error:
            return _Rejected(kind=kind, reason=str(error))
        words = word_count(record.turns)
        return _Accepted(
            id=record.id, image=data, header=header, words=words if has_image else -words, n_tok=len(encoded.input_ids), n_lab=n_lab
        )


def _read_image(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"image {path}: cannot be read ({error})") from error
    if not data:
        raise DataError(f"image {path}: is an empty file")
    return data


@dataclass
class _Writer:
    """Collects verdicts in the order of the annotation file: shards, index rows, keys, the list of the rejected."""

    directory: Path
    samples_per_shard: int
    rows: list[tuple[int, ...]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.shards = ShardWriter(self.directory, samples_per_shard=self.samples_per_shard)
        self._used_keys: set[str] = set()
        self._sources: Counter[tuple[str, bool]] = Counter()
        self._rejected_file = (self.directory / REJECTED).open("w", encoding="utf-8")

    @property
    def num_rejected(self) -> int:
        return self.rejected.total()

    def add(self, entry: Entry, outcome: _Accepted | _Rejected) -> None:
        self._sources[source_of(entry.content), isinstance(outcome, _Accepted)] += 1
        if isinstance(outcome, _Rejected):
            self._reject(entry, outcome)
        else:
            self._accept(entry, outcome)

    def close(self) -> None:
        self.shards.close()
        self._rejected_file.close()

    def source_counts(self) -> dict[str, SourceCount]:
        names = sorted({name for name, _ in self._sources})
        return {name: SourceCount(samples=self._sources[name, True], rejected=self._sources[name, False]) for name in names}

    def _accept(self, entry: Entry, sample: _Accepted) -> None:
        key = self._new_key(sample.id, entry.position)
        extension = sample.header.extension if sample.header else ""
        text = json.dumps(entry.content).encode("ascii")
        location = self.shards.write(key, text=text, image=sample.image, extension=extension)
        self.keys.append(key)
        self.rows.append(_row(location, sample))

    def _reject(self, entry: Entry, verdict: _Rejected) -> None:
        self.rejected[verdict.kind] += 1
        content = entry.content if isinstance(entry.content, dict) else {}
        line = {"position": entry.position, "id": content.get("id"), "image": content.get("image"), **dataclasses.asdict(verdict)}
        self._rejected_file.write(json.dumps(line) + "\n")

    def _new_key(self, record_id: str, position: int) -> str:
        """The id, made fit for a file name; "~position" tells repeated ids apart (published files do repeat ids)."""
        key = re.sub(r"[^A-Za-z0-9_-]", "_", record_id)[:MAX_KEY_LENGTH]
        if not key or key in self._used_keys:
            key = f"{key}~{position}"
        self._used_keys.add(key)
        return key


def _row(location: Location, sample: _Accepted) -> tuple[int, ...]:
    image, text, header = location.image, location.text, sample.header
    width, height = (header.width, header.height) if header else (0, 0)
    place = (location.shard, image.offset, image.length, image.crc32, text.offset, text.length, text.crc32)
    return (*place, width, height, int(header is not None), sample.words, sample.n_tok, sample.n_lab, 0)


class _Progress:
    """A line every few seconds: how far, how fast, how long still."""

    def __init__(self, *, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._last = time.monotonic()

    def advance(self, *, rejected: int) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= PROGRESS_EVERY_S or self._done == self._total:
            self._last = now
            rate = self._done / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate
            get_logger().info(
                f"prepared {self._done} of {self._total} records, {rate:.0f} records/s, {rejected} rejected, about {left:.0f} s left"
            )


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A directory beside the output, so that publishing is a rename; gone afterwards, whatever happens."""
    staging = output.parent / f".{output.name}.partial-{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_too_many(writer: _Writer, staging: Path, *, options: PrepareOptions, total: int) -> None:
    fraction = writer.num_rejected / total
    if writer.rows and fraction <= options.max_rejected_fraction:
        return
    kept = options.output.parent / f"{options.output.name}.{REJECTED}"
    os.replace(staging / REJECTED, kept)
    reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(writer.rejected.items()))
    raise DataError(
        f"annotations {options.annotations}: {writer.num_rejected} of {total} records are bad ({fraction:.1%}: {reasons}), more than "
        f"--max-rejected-fraction {options.max_rejected_fraction}; nothing was published. Each is named with its reason in {kept}"
    )


def _publish(staging: Path, output: Path) -> None:
    """Rename `staging` to `output`; what was there is removed after the new data set is in place."""
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    if output.exists():
        os.replace(output, old)
    os.replace(staging, output)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()

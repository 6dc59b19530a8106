"""Quarantine of samples that cannot be read during training: records, placeholder examples and the accepted fraction.

The slot of such a sample stays in the batch with a mean-colour image and masked labels. loader.py detects failures;
train/data_feed.py exchanges them between ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch

from megatron_share4v.data.records import Example
from megatron_share4v.errors import DataError
from megatron_share4v.files import read_text
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.collectives import broadcast_object, gather_objects
from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX

TOLERATED = 8  # number of failures that is accepted at any positive max_fraction
LISTED = 20  # failures listed in a message


@dataclass(frozen=True)
class Fault:
    """One sample that could not be read. row: row number in the index; name: `shard:key`."""

    row: int
    name: str
    reason: str


def placeholder_example(name: str, *, text_length: int, has_image: bool) -> Example:
    """Create an example without labels for an unreadable text, with the text length of the index."""
    ids = torch.zeros(max(text_length, 1), dtype=torch.int64)
    if has_image:
        ids[0] = IMAGE_TOKEN_INDEX
    return Example(key=name, name=name, input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), pixels=None)


def mask_labels(example: Example) -> Example:
    """Return the example with all labels set to IGNORE_INDEX."""
    return replace(example, labels=torch.full_like(example.labels, IGNORE_INDEX))


def exceeds_limit(count: int, *, consumed: int, max_fraction: float) -> bool:
    """Return whether `count` failures among `consumed` samples exceed the accepted number."""
    return count > (max(TOLERATED, max_fraction * consumed) if max_fraction else 0)


def format_faults(faults: Sequence[Fault]) -> str:
    """Format at most LISTED faults for a message, one per line."""
    lines = [f"\n  {fault.name}: {fault.reason.removeprefix(fault.name + ': ')}" for fault in faults[:LISTED]]
    more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
    return "".join(lines) + more


class QuarantineLog:
    """Log of unreadable samples (quarantine.jsonl) that ends the run when there are too many."""

    FILE = "quarantine.jsonl"

    def __init__(self, path: Path, log: TextIO | None, *, max_fraction: float) -> None:
        """Count the samples already logged. Collective.

        log: `path` opened for appending on rank 0, with the lines up to the resumed step; None on other ranks.
        """
        self._path, self._log, self._max_fraction = path, log, max_fraction
        lines = 0 if log is None else len(read_text(path).splitlines())
        self.count = broadcast_object(lines)

    def record(self, faults: Sequence[Fault], *, step: int, rows: Sequence[int], consumed: int) -> int:
        """Record the faults of all ranks in a step over `rows`; return the number of samples. Collective.

        consumed: samples of the run including this step. Raises DataError with the list, on all ranks, when more than
        data.max_faulty_fraction of them have failed.
        """
        # The same sample may fail on the first and on the last stage; the lowest rank's reason is kept.
        by_row = {fault.row: fault for own in reversed(gather_objects(faults)) for fault in reversed(own)}
        failed = [by_row[row] for row in rows if row in by_row]
        self.count += len(failed)
        self._write(failed, step=step)
        if exceeds_limit(self.count, consumed=consumed, max_fraction=self._max_fraction):
            raise DataError(
                f"{self.count} of {consumed} samples could not be read, more than data.max_faulty_fraction "
                f"{self._max_fraction:g} accepts; all are listed in {self._path}. Repair the data set "
                f"(tools/prepare_data.py again), or accept more. In this step:{format_faults(failed)}"
            )
        return len(failed)

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()

    def _write(self, faults: Sequence[Fault], *, step: int) -> None:
        if self._log is None:
            return
        for fault in faults:
            reason = fault.reason.removeprefix(f"{fault.name}: ")
            self._log.write(json.dumps({"step": step, "sample": fault.name, "reason": reason}) + "\n")
        self._log.flush()
        get_logger().warning(
            "step %d: %d samples could not be read; their slots are kept without labels:%s",
            step,
            len(faults),
            format_faults(faults),
        )

"""Benchmark loaded for an evaluation: files located and questions read before any model is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_share4v.errors import ConfigError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.records import Answer, Decoding, Doc
from megatron_share4v.evaluate.task import Task
from megatron_share4v.evaluate.tasks import get_task


class Evaluation:
    """A loaded benchmark.

    every: all questions. items: those to evaluate. whole: both are the same, so there is no --limit. digest: hash of
    all questions, so that answers to other questions with the same ids do not match.
    """

    def __init__(
        self,
        benchmark: str,
        *,
        data: Path,
        out: Path,
        split: str | None = None,
        profile: Profile = OFFICIAL,
        limit: int | None = None,
    ) -> None:
        """Load a benchmark.

        data, split: see Task.open. limit: only the first so many questions. Raises ConfigError, DataError.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be a directory ({error.strerror}); give another one") from error
        self.task: Task = get_task(benchmark)
        self.out, self.profile = out, profile
        self.folder: BenchmarkFolder = self.task.open(data, split)
        self.every: Sequence[Doc] = self.task.items(self.folder)
        self.items: Sequence[Doc] = self.every if limit is None else self.every[:limit]
        self.whole = len(self.items) == len(self.every)
        self.digest = _digest(self.every)
        self.decoding: Decoding = self.task.decoding(profile)

    def select(self, answers: Iterable[Answer]) -> list[Answer]:
        """Return the answers to the questions of this evaluation: with --limit a part of a whole answer file."""
        ids = {item.id for item in self.items}
        return [answer for answer in answers if answer.id in ids]


def _digest(items: Sequence[Doc]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.prompt]).encode())
    return digest.hexdigest()[:16]

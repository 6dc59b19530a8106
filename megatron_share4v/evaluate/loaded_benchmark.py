"""Benchmark loaded for an evaluation: files located and questions read before any model is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_share4v.errors import ConfigError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.records import Decoding, Doc
from megatron_share4v.evaluate.task import Task
from megatron_share4v.evaluate.tasks import get_task


class Evaluation:
    """A loaded benchmark.

    digest: hash of all questions, so that answers to other questions with the same ids do not match. complete: no
    --limit.
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
        every = self.task.items(self.folder)
        self.items: Sequence[Doc] = every if limit is None else every[:limit]
        self.complete = len(self.items) == len(every)
        self.digest = _digest(every)
        self.decoding: Decoding = self.task.decoding(profile)


def _digest(items: Sequence[Doc]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.prompt]).encode())
    return digest.hexdigest()[:16]

"""One benchmark from its files to its number: what is left to ask, who asks it, and what is written when all is answered.

Replicas share the questions; each has a journal, so that a killed job goes on where it was, at any number of them. answers.jsonl is the same however
the work was cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.answers import make_answer, write_rows
from megatron_share4v.evaluate.item import Answer, Decoding, Item, Scores
from megatron_share4v.evaluate.judge import Judgement, how_to_go_on, judge
from megatron_share4v.evaluate.layout import Folder
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.published import Measured, save_chart, table
from megatron_share4v.evaluate.result import ModelFacts, result_of, write_result
from megatron_share4v.evaluate.task import Task, by_id
from megatron_share4v.evaluate.tasks import get_task
from megatron_share4v.infer.journal import Done, Journal, Share
from megatron_share4v.infer.stream import Outcome
from megatron_share4v.log import get_logger
from megatron_share4v.remote.chat import Chat

Asker = Callable[[Iterator[Item]], Iterator[list[Outcome]]]
JOURNAL, ANSWERS, RESULT, SUBMISSION, TABLE, CHART = "journal", "answers.jsonl", "result.json", "submission", "table.md", "chart.png"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """model None: the official one. chat None: its questions are written to a file."""

    model: str | None = None
    chat: Chat | None = None
    seed: int | None = None


class Evaluation:
    """A benchmark whose files are all there, before any model is opened."""

    def __init__(self, benchmark: str, *, data: Path, out: Path, split: str | None = None, profile: Profile = OFFICIAL, limit: int | None = None) -> None:
        """data, split: Task.open. limit: only the first so many questions. Raises ConfigError, DataError."""
        self.task: Task = get_task(benchmark)
        self.out, self.profile = out, profile
        self.folder: Folder = self.task.open(data, split)
        every = self.task.items(self.folder)
        self.items: Sequence[Item] = every if limit is None else every[:limit]
        self.complete = len(self.items) == len(every)
        self._digest = _digest(every)
        self.decoding: Decoding = self.task.decoding(profile)

    def run(
        self, asker: Asker, *, model: ModelFacts, share: Share, judging: Judge = Judge(), compared: Sequence[Path] = (), restart: bool = False
    ) -> dict[str, Any] | None:
        """Ask what is left, write all files; the content of result.json on the first process, None on the others.

        compared: other result.json files for table and chart. restart: forget earlier answers. Raises DataError for questions that cannot be asked.
        """
        others = [Measured.read(path) for path in compared]
        answers = self._answers(asker, model, share, restart)
        if answers is None:
            return None
        write_rows(self.out / ANSWERS, self.task.rows(self.items, answers, model=model.name))
        verdict = self._judged(answers, judging)
        scores = self.task.score(self.folder, self.items, answers, profile=self.profile, verdicts=verdict.verdicts if verdict else None)
        if self.task.judged and verdict is None:
            scores = Scores({}, None, note=how_to_go_on(self.out, model=self._judge_model(judging)))
        content = result_of(self, scores, model=model, judgement=verdict)
        write_result(self.out / RESULT, content)
        self._hand_in(answers, verdict)
        measured = [*others, Measured.read(self.out / RESULT)]
        (self.out / TABLE).write_text(table(measured), encoding="utf-8")
        save_chart(self.out / CHART, measured)
        return content

    def _answers(self, asker: Asker, model: ModelFacts, share: Share, restart: bool) -> list[Answer] | None:
        """All of them, in order, on the first process."""
        job = {"model": model.fingerprint, "benchmark": self.task.name, "split": self.folder.split, **asdict(self.decoding), "questions": self._digest}
        journal = Journal(self.out / JOURNAL, rank=share.rank)
        try:
            journal.begin(job, restart=restart)
            share.meet()
            done = Done(self.out / JOURNAL, job=job, row=Outcome)
            left = [item for item in self.items if item.id not in done]
            share.meet()  # all have read the journals: now they may grow
            self._ask(asker, left[share.rank :: share.size], journal)
            share.meet()
        finally:
            journal.close()
        if share.rank:
            return None
        rows = Done(self.out / JOURNAL, job=job, row=Outcome).rows(item.id for item in self.items)
        return [make_answer(item, self.decoding.clean(row.text)) for item, row in zip(self.items, rows)]

    def _ask(self, asker: Asker, items: Sequence[Item], journal: Journal) -> None:
        with tqdm(total=len(items), desc=self.task.name, unit="question") as bar:
            for outcomes in asker(iter(items)):
                journal.append(outcome for outcome in outcomes if outcome.error is None)
                bar.update(len(outcomes))
                if failed := next((outcome for outcome in outcomes if outcome.error is not None), None):
                    raise DataError(f"{self.task.name}, question {failed.id}: {failed.error}. The answers so far are kept; the same command goes on")

    def _judge_model(self, judging: Judge) -> str:
        return judging.model or self.task.judged.official

    def _judged(self, answers: Sequence[Answer], judging: Judge) -> Judgement | None:
        if self.task.judged is None:
            return None
        requests = self.task.judged.requests(self.items, by_id(answers), self.profile)
        with tqdm(total=len(requests), desc="judge", unit="reply", disable=judging.chat is None) as bar:
            return judge(requests, self.out, model=self._judge_model(judging), chat=judging.chat, seed=judging.seed, on_reply=lambda _: bar.update())

    def _hand_in(self, answers: Sequence[Answer], verdict: Judgement | None) -> None:
        """Files for servers and official scorers, which want all questions."""
        if not self.complete:
            get_logger().warning("no files for a server: only %d questions were asked", len(self.items))
            return
        files = dict(self.task.submission(self.folder, self.items, answers))
        if verdict:
            files |= self.task.judged.files(self.items, by_id(answers), verdict.verdicts, verdict.model)
        for name, content in files.items():
            (self.out / SUBMISSION).mkdir(exist_ok=True)
            (self.out / SUBMISSION / name).write_bytes(content)


def _digest(items: Sequence[Item]) -> str:
    """Of all that a benchmark asks: a journal of other questions with the same ids is not taken for this one's. Only `limit` may change."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.prompt]).encode())
    return digest.hexdigest()[:16]

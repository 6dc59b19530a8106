"""Benchmark task: files, questions with official prompts, decoding settings, official answer rows, submission files
and score.

The tasks are in tasks/. Nothing here depends on a model: a client generates predictions for the questions with
`decoding`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.evaluate.answers import answer_row
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile
from megatron_share4v.evaluate.judge_prompts import JudgeReplies, Request
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.records import Answer, Decoding, Doc, Scores

PredictionTexts = Mapping[str, str]
"""Prediction texts by question id. The benchmark defines how missing ones count."""
MetricValues = Mapping[str, float]

COUNT_AS_WRONG, LEFT_OUT = "they count as wrong", "they are left out of the score"
OFFICIAL_STOPS = "the official script stops at them"
"""What the official scripts do with questions that have no answer."""

# Decoding settings of the four official runners.
LOADER = Decoding(max_new_tokens=128, image_mode="pad")
MMBENCH = Decoding(max_new_tokens=1024, image_mode="pad")
# ShareGPT4V's model_vqa.py and model_vqa_science.py preprocess without the model's configuration and so crop; LLaVA has
# since moved them to pad.
CROPPED = Decoding(max_new_tokens=1024, image_mode="crop")
# Q-Bench's model_vqa_qbench.py also crops and uses "a curious human". It loads the model in 8 bits, which is not
# reproduced.
QBENCH = Decoding(max_new_tokens=1024, image_mode="crop", system="human")


@dataclass(frozen=True)
class JudgeSpec:
    """Scoring by a judge model. official: the judge of the published numbers.

    requests: builds the judge requests. measure: computes the metrics from the replies. files: official files of the
    replies, name -> content, the judge's name last. unreadable: metric that counts the questions whose replies cannot
    be read. rule: what the official script does with each of them.
    """

    official: str
    requests: Callable[[Sequence[Doc], PredictionTexts, Profile], Sequence[Request]]
    measure: Callable[[Sequence[Doc], JudgeReplies, Profile], MetricValues]
    files: Callable[[Sequence[Doc], PredictionTexts, JudgeReplies, str], Mapping[str, bytes]]
    unreadable: str
    rule: str

    def describe_unreadable(self, values: MetricValues, profile: Profile) -> list[str]:
        """Describe the unreadable replies that `values` counts; empty if there are none."""
        count = values.get(self.unreadable)
        rule = self.rule if profile is OFFICIAL else "is left out"
        return [f"the judge's replies to {count:.0f} questions cannot be read: each {rule}"] if count else []


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    folder: the official name of its folder. read: yields its questions in official order. headline: the score of the
    paper's table.

    measure: computes the local metrics; None when only a server scores. check: describes questions that cannot be
    scored, for example because the official files lack their label; empty if there are none. missing: what the official
    script does with a question without an answer. submit: the files for that server, or those of the official scorer.
    row: the official answer row, from item, answer and the model's name. server: where to upload. splits: the first is
    the default.
    """

    name: str
    title: str
    folder: str
    needs: tuple[RequiredFile, ...]
    read: Callable[[BenchmarkFolder], Iterator[Doc]]
    official: Decoding
    headline: str | None
    splits: tuple[str, ...] = ("",)
    scored: tuple[str, ...] = ("",)
    """Splits with public answers."""
    measure: Callable[[BenchmarkFolder, Sequence[Doc], PredictionTexts, Profile], MetricValues] | None = None
    check: Callable[[BenchmarkFolder, Sequence[Doc]], str] = lambda folder, items: ""
    missing: str = COUNT_AS_WRONG
    skipped: Callable[[BenchmarkFolder], Collection[str]] = lambda folder: ()
    """Ids of questions of the official file that are left out, to which official answer files have answers."""
    submit: Callable[[BenchmarkFolder, Sequence[Doc], PredictionTexts], Mapping[str, bytes]] | None = None
    row: Callable[[Doc, Answer, str], dict[str, Any]] = answer_row
    server: str = ""
    judged: JudgeSpec | None = None

    def split(self, name: str | None) -> str:
        """Return the split, the default for None. Raises ConfigError for one that does not exist."""
        if name is not None and name not in self.splits:
            choices = ", ".join(self.splits) if self.splits != ("",) else "it has only one: leave --split out"
            raise ConfigError(f"--split {name}: {self.name} has no such split; {choices}")
        return self.splits[0] if name is None else name

    def open(self, data: Path, split: str | None = None) -> BenchmarkFolder:
        """Locate the files below `data`.

        Raises ConfigError, and DataError naming what is missing, the expected layout and where to get it.
        """
        return BenchmarkFolder(data, official=self.folder, needs=self.needs, split=self.split(split))

    def items(self, folder: BenchmarkFolder) -> list[Doc]:
        """Read all questions in official order.

        Raises DataError for damaged files, files of other benchmarks, and empty ones.
        """
        items = list(self.read(folder))
        if not items:
            raise DataError(f"{self.name}: its files have no questions\n{folder.layout}")
        return items

    def decoding(self, profile: Profile = OFFICIAL) -> Decoding:
        """Decoding settings of a profile; `corrected` pads every image and uses the system prompt of training."""
        return self.official if profile is OFFICIAL else replace(self.official, image_mode="pad", system="user")

    def rows(self, items: Sequence[Doc], answers: Iterable[Answer], *, model: str) -> Iterator[dict[str, Any]]:
        """Yield rows of the official answer file in the order of the questions, without unanswered ones."""
        texts = {answer.id: answer for answer in answers}
        for item in items:
            if item.id in texts:
                yield self.row(item, texts[item.id], model)

    def submission(
        self, folder: BenchmarkFolder, items: Sequence[Doc], answers: Iterable[Answer]
    ) -> Mapping[str, bytes]:
        """Files for the evaluation server or official scorer, name -> content; empty when there is none."""
        return self.submit(folder, items, by_id(answers)) if self.submit else {}

    def score(
        self,
        folder: BenchmarkFolder,
        items: Sequence[Doc],
        answers: Iterable[Answer],
        *,
        profile: Profile = OFFICIAL,
        verdicts: JudgeReplies | None = None,
        whole: bool = True,
    ) -> Scores:
        """Compute the local score.

        verdicts: replies of the judge, if any. whole: `items` are all questions of the split. Without a local score
        `headline` is None and `note` says what to do. Raises DataError where the official script stops, unless that is
        because of missing questions or answers.
        """
        texts = by_id(answers)
        gaps = self.describe_gaps(folder, items, texts)
        if self.judged and verdicts is None:
            judge = f"{self.name} is scored by a judge: give --judge-base-url and --judge-model"
            return Scores({}, None, note="; ".join([*gaps, judge]), complete=False)
        try:
            if self.judged and verdicts is not None:
                values = self.judged.measure(items, verdicts, profile)
            elif self.measure and folder.split in self.scored:
                values = self.measure(folder, items, texts, profile)
            else:
                upload = f"answers of {self.name} {folder.split} are not public: upload submission/ to {self.server}"
                return Scores({}, None, note="; ".join([*gaps, upload]), complete=not gaps)
        except DataError as error:
            if whole and not gaps:
                raise
            return Scores({}, None, note="; ".join([*gaps, f"no score: {error}"]), complete=False)
        headline, notes = self.headline, gaps
        if self.judged:
            notes = [*notes, *self.judged.describe_unreadable(values, profile)]
        if headline is None or math.isnan(values.get(headline, math.nan)):
            notes = [*notes, f"{headline} cannot be computed: questions, or right answers beside them, are missing"]
            headline = None
        return Scores(values, headline, note="; ".join(notes), complete=not gaps)

    def describe_gaps(self, folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> list[str]:
        """Describe the questions without an answer and those that cannot be scored."""
        missing = [item.question_id for item in items if item.id not in texts]
        gaps = [unscored] if (unscored := self.check(folder, items)) else []
        if missing:
            gaps.append(
                f"{len(missing)} of {len(items)} questions have no answer, the first is {missing[0]!r}: {self.missing}"
            )
        return gaps


def by_id(answers: Iterable[Answer]) -> dict[str, str]:
    """Map question ids to prediction texts."""
    return {answer.id: answer.text for answer in answers}


def item_ids(question_ids: Iterable[object]) -> Iterator[str]:
    """Yield a unique id for each question: the k-th with the same question_id gets the suffix "~k"."""
    seen: Counter[str] = Counter()
    for question_id in question_ids:
        name = str(question_id)
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}~{seen[name]}"


def encode_json(content: object, *, indent: int | None = None) -> bytes:
    """Encode JSON as the official converters do."""
    return json.dumps(content, indent=indent).encode()


def encode_jsonl(rows: Iterable[object]) -> bytes:
    """Encode one JSON object per line."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

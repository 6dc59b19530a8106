"""What a benchmark is: its files, its questions as official prompts, how they are decoded, the official answer rows and submission files, its score.

The thirteen are in tasks/. No model here: whoever has one asks the items with `decoding` and brings the answers back.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.evaluate.answers import answer_row
from megatron_share4v.evaluate.benchmark_files import Folder, Need
from megatron_share4v.evaluate.judge_prompts import Request, Verdicts
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.records import Answer, Decoding, Item, Scores

Texts = Mapping[str, str]
"""Answers by the item's id. Where one is missing, the benchmark's own rule holds."""
Values = Mapping[str, float]

# The four official runners, by what differs between them.
LOADER = Decoding(max_new_tokens=128, image_mode="pad")
MMBENCH = Decoding(max_new_tokens=1024, image_mode="pad")
# ShareGPT4V's model_vqa.py and model_vqa_science.py preprocess without the model's configuration and so crop; LLaVA has since moved them to pad.
CROPPED = Decoding(max_new_tokens=1024, image_mode="crop")
# Its model_vqa_qbench.py crops too, and speaks of "a curious human". (It also loads the model in 8 bits, which is not reproduced.)
QBENCH = Decoding(max_new_tokens=1024, image_mode="crop", system="human")


@dataclass(frozen=True)
class Judged:
    """A benchmark whose answers a language model grades. official: the judge of the published numbers.

    requests: what it is asked. measure: the scores from its replies. files: official files of its replies, name -> content, the judge's name last.
    """

    official: str
    requests: Callable[[Sequence[Item], Texts, Profile], Sequence[Request]]
    measure: Callable[[Sequence[Item], Verdicts, Profile], Values]
    files: Callable[[Sequence[Item], Texts, Verdicts, str], Mapping[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark. folder: the official name of its folder. read: its questions in official order. headline: the score of the paper's table.

    measure: the local score; None on a split that only a server scores. submit: the files for that server, or those of the official scorer.
    row: the official answer row, from item, answer and the model's name. server: where to upload. splits: the first is the default.
    """

    name: str
    title: str
    folder: str
    needs: tuple[Need, ...]
    read: Callable[[Folder], Iterator[Item]]
    official: Decoding
    headline: str | None
    splits: tuple[str, ...] = ("",)
    scored: tuple[str, ...] = ("",)
    """Splits whose answers are public."""
    measure: Callable[[Folder, Sequence[Item], Texts, Profile], Values] | None = None
    submit: Callable[[Folder, Sequence[Item], Texts], Mapping[str, bytes]] | None = None
    row: Callable[[Item, Answer, str], dict[str, Any]] = answer_row
    server: str = ""
    judged: Judged | None = None

    def split(self, name: str | None) -> str:
        """The default for None. Raises ConfigError for one that does not exist."""
        if name is not None and name not in self.splits:
            choices = ", ".join(self.splits) if self.splits != ("",) else "it has only one: leave --split out"
            raise ConfigError(f"--split {name}: {self.name} has no such split; {choices}")
        return self.splits[0] if name is None else name

    def open(self, data: Path, split: str | None = None) -> Folder:
        """Its files below `data`. Raises ConfigError, and DataError naming what is missing, the expected layout and where to get it."""
        return Folder(data, official=self.folder, needs=self.needs, split=self.split(split))

    def items(self, folder: Folder) -> list[Item]:
        """All questions in official order. Raises DataError for damaged or foreign files, and for none at all."""
        items = list(self.read(folder))
        if not items:
            raise DataError(f"{self.name}: there is not one question in its files\n{folder.layout}")
        return items

    def decoding(self, profile: Profile = OFFICIAL) -> Decoding:
        """`corrected`: every image is padded and every system prompt is that of training."""
        return self.official if profile is OFFICIAL else replace(self.official, image_mode="pad", system="user")

    def rows(self, items: Sequence[Item], answers: Iterable[Answer], *, model: str) -> Iterator[dict[str, Any]]:
        """The rows of the official answer file, in the order of the items; those without an answer are left out."""
        texts = {answer.id: answer for answer in answers}
        for item in items:
            if item.id in texts:
                yield self.row(item, texts[item.id], model)

    def submission(self, folder: Folder, items: Sequence[Item], answers: Iterable[Answer]) -> Mapping[str, bytes]:
        """Official files, name -> content; none where no server and no official scorer wants one."""
        return self.submit(folder, items, by_id(answers)) if self.submit else {}

    def score(
        self,
        folder: Folder,
        items: Sequence[Item],
        answers: Iterable[Answer],
        *,
        profile: Profile = OFFICIAL,
        verdicts: Verdicts | None = None,
    ) -> Scores:
        """The local score; verdicts: of the judge, where there is one. Without a local score `headline` is None and `note` says what to do."""
        if self.judged and verdicts is None:
            return Scores({}, None, note=f"a judge grades {self.name}: give --judge-base-url and --judge-model")
        if self.judged:
            values = self.judged.measure(items, verdicts, profile)
        elif self.measure and folder.split in self.scored:
            values = self.measure(folder, items, by_id(answers), profile)
        else:
            return Scores(
                {},
                None,
                note=f"nobody has the right answers of {self.name} {folder.split} but {self.server}: upload the files of submission/",
            )
        if math.isnan(values.get(self.headline, math.nan)):
            return Scores(
                values,
                None,
                note=f"{self.headline} cannot be computed: questions, or right answers beside them, are missing",
            )
        return Scores(values, self.headline)


def by_id(answers: Iterable[Answer]) -> dict[str, str]:
    """Texts by the item's id."""
    return {answer.id: answer.text for answer in answers}


def item_ids(question_ids: Iterable[object]) -> Iterator[str]:
    """A unique id for each: the k-th of the same question_id gets "~k"."""
    seen: Counter[str] = Counter()
    for question_id in question_ids:
        name = str(question_id)
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}~{seen[name]}"


def as_json(content: object, *, indent: int | None = None) -> bytes:
    """As the official converters write it."""
    return json.dumps(content, indent=indent).encode()


def as_jsonl(rows: Iterable[object]) -> bytes:
    """One object a line."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

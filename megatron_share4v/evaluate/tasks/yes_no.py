"""MME and POPE: yes/no questions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile, read_jsonl, require
from megatron_share4v.evaluate.directives import SHORT, question_text
from megatron_share4v.evaluate.metrics import mme, pope
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.task import LEFT_OUT, LOADER, MetricValues, PredictionTexts, Task
from megatron_share4v.evaluate.tasks.questions import COCO, both, make_docs, playground, read_questions
from megatron_share4v.files import read_text

POPE_SPLITS = ("random", "popular", "adversarial")
# The release with the labels of the 8,910 questions; the newest one has 3,000 labels in `random`.
_POPE = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


def _truth(folder: BenchmarkFolder, items: Sequence[Doc]) -> mme.Truth:
    """Read the ground truth from MME's text files, beside the images or in a folder of their own."""
    truth: dict[tuple[str, str, str], str] = {}
    for subtask in dict.fromkeys(str(item.question_id).split("/")[0] for item in items):
        directory = folder["images"] / subtask
        directory = directory / "questions_answers_YN" if (directory / "images").is_dir() else directory
        files = sorted(directory.glob("*.txt"))
        if not files:
            raise DataError(f"{directory} has no .txt with questions and answers\n{folder.layout}")
        for path in files:
            truth |= mme.parse_truth(subtask, path.name, read_text(path, errors="replace"))
    return truth


def _mme_files(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile = OFFICIAL
) -> Mapping[str, str]:
    answers = [mme.MmeAnswer(str(item.question_id), item.prompt, texts[item.id]) for item in items if item.id in texts]
    return mme.convert(answers, _truth(folder, items), profile=profile)


def _read_mme(folder: BenchmarkFolder) -> Iterator[Doc]:
    items = list(make_docs(folder, read_questions(folder, ending=SHORT)))
    # Check before generation that each question belongs to MME.
    _mme_files(folder, items, {item.id: "" for item in items})
    yield from items


def _measure_mme(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    # Accuracy+ takes two lines as one picture: an answer without the other one of its picture would shift all lines.
    total = Counter(str(item.question_id) for item in items)
    answered = Counter(str(item.question_id) for item in items if item.id in texts)
    halves = [name for name, count in answered.items() if count != total[name] or count % 2]
    if halves:
        raise DataError(
            f"MME scores a picture by the answers to all its questions; {len(halves)} pictures have answers to a part "
            f"of them, the first is {halves[0]}"
        )
    found = mme.calculate(_mme_files(folder, items, texts, profile), profile=profile)
    return {"perception": found.perception, "cognition": found.cognition} | {
        name: task.score for name, task in found.tasks.items()
    }


def _read_pope(folder: BenchmarkFolder) -> Iterator[Doc]:
    rows = list(read_questions(folder, ending=SHORT))
    for where, row in rows:
        if row.get("category") not in POPE_SPLITS:
            raise DataError(
                f"{where}: category {row.get('category')!r} is none of {', '.join(POPE_SPLITS)}; take the official "
                f"file\n{folder.layout}"
            )
    labels = {name: _labels(folder, name) for name in POPE_SPLITS}
    items = []
    for item in make_docs(folder, rows):
        waiting = labels[item.meta["category"]][_pope_key(item.meta)]
        items.append(replace(item, meta={**item.meta, "label": waiting.popleft() if waiting else None}))
    for name, split in _by_split(items).items():
        without = sum(item.meta["label"] is None for item in split)
        if 2 * without > len(split):  # the label file belongs to other questions
            raise DataError(f"{_check_pope(folder, split)}; take the {folder[name].name} below\n{folder.layout}")
    yield from items


def _by_split(items: Sequence[Doc]) -> dict[str, list[Doc]]:
    return {name: [item for item in items if item.meta["category"] == name] for name in POPE_SPLITS}


def _pope_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """Picture and object of a question; releases differ in "a" and "an", and one has "imange" for "image"."""
    question = question_text(row["text"])
    found = re.match(r"is there an? (.+) in the \w+\??$", question)
    return PurePosixPath(row["image"]).name, found[1] if found else question


def _labels(folder: BenchmarkFolder, split: str) -> dict[tuple[str, str], deque[str]]:
    """Read the labels of a split by picture and object; the files are JSONL despite their names.

    Their question_id is a count of its own, which differs from that of the question file.
    """
    labels: dict[tuple[str, str], deque[str]] = defaultdict(deque)
    for where, row in read_jsonl(folder[split]):
        require(row, where=where, image=str, text=str, label=str)
        labels[_pope_key(row)].append(row["label"])
    return labels


def _check_pope(folder: BenchmarkFolder, items: Sequence[Doc]) -> str:
    """Describe the questions that have no label; empty if there are none."""
    found = []
    for name, split in _by_split(items).items():
        without = [item for item in split if item.meta["label"] is None]
        if without:
            found.append(
                f"{len(without)} of {len(split)} questions of {name} have no label in {folder[name]}, the first is "
                f"{without[0].question_id}, {without[0].prompt.splitlines()[0]!r} about {without[0].meta['image']}"
            )
    return "; ".join(found)


def _measure_pope(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    # The official script pairs answers and labels of a split by their order alone. Here each question has its label, so
    # that missing answers and labels of further questions shift nothing.
    splits = {}
    for name, split in _by_split(items).items():
        scored = [item for item in split if item.meta["label"] is not None and item.id in texts]
        splits[name] = pope.score(
            [texts[item.id] for item in scored], [item.meta["label"] for item in scored], profile=profile
        )
    found = pope.mean(list(splits.values()))
    values = {"f1": found.headline, "accuracy": 100 * found.accuracy, "yes ratio": 100 * found.yes_ratio}
    for name, one in splits.items():
        values |= {
            f"{name} {kind}": 100 * getattr(one, kind)
            for kind in ("f1", "accuracy", "precision", "recall", "yes_ratio")
        }
    return values


TASKS = (
    Task(
        name="mme",
        title="MME",
        folder="MME",
        official=LOADER,
        headline="perception",
        needs=(
            playground("questions", *both("mme.jsonl")),
            RequiredFile(
                "images",
                # ShareGPT4V's script and its documentation disagree about the name.
                (
                    "MME_Benchmark_release/",
                    "MME_Benchmark_release_version/MME_Benchmark/",
                    "MME_Benchmark_release_version/",
                ),
                "by request, see https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
            ),
        ),
        read=_read_mme,
        measure=_measure_mme,
        missing=LEFT_OUT,
        # What the official calculation.py reads.
        submit=lambda folder, items, texts: {
            f"{name}.txt": text.encode() for name, text in _mme_files(folder, items, texts).items()
        },
    ),
    Task(
        name="pope",
        title="POPE",
        folder="pope",
        official=LOADER,
        headline="f1",
        needs=(
            playground("questions", *both("pope_test.jsonl")),
            *(RequiredFile(name, (f"coco/coco_pope_{name}.json",), _POPE) for name in POPE_SPLITS),
            RequiredFile("images", ("val2014/",), f"{COCO}val2014.zip"),
        ),
        read=_read_pope,
        check=_check_pope,
        measure=_measure_pope,
        missing=LEFT_OUT,
    ),
)

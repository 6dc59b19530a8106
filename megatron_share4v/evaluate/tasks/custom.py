"""Custom questions in the format of the official model_vqa.py: questions.jsonl with question_id, image and text;
images beside it or in images/.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_share4v.data.prepare.record_keys import find_image, find_lost_media, shorten
from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile, Row, get_field, read_jsonl
from megatron_share4v.evaluate.metrics.profile import Profile
from megatron_share4v.evaluate.metrics.vqa_answers import normalise_evalai
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.task import CROPPED, MetricValues, PredictionTexts, Task, item_ids

_REMEDY = (
    'Write a line as {"question_id": 1, "image": "a.jpg", "text": "What is this?"}: an id of your choice, one picture '
    "or none, and the question"
)


def _read(folder: BenchmarkFolder) -> Iterator[Doc]:
    rows = list(read_jsonl(folder["questions"]))
    names = item_ids(get_field(row, "question_id", (int, str), where=where, remedy=_REMEDY) for where, row in rows)
    for name, (where, row) in zip(names, rows):
        yield Doc(
            id=name,
            question_id=row["question_id"],
            prompt=get_field(row, "text", str, where=where, remedy=_REMEDY),
            image=_find_image(folder, row, where=where),
            meta=row,
        )


def _find_image(folder: BenchmarkFolder, row: Row, *, where: str) -> Path | None:
    """Return the picture of a question, if it has one. Raises DataError when it is not there."""
    key, given = find_image(row)
    if key is None or given is None:
        if reason := find_lost_media(row):
            raise DataError(f"{where}: {reason}. {_REMEDY}")
        return None
    name = get_field({key: given}, key, str, where=where, remedy=_REMEDY)
    image = next((p for p in (folder.root / "images" / name, folder.root / name) if os.path.isfile(p)), None)
    if image is None:
        raise DataError(
            f"{where}: image {shorten(name)} is neither in {folder.root / 'images'} nor in {folder.root}\n"
            f"{folder.layout}"
        )
    return image


def _accepted(item: Doc) -> list[str]:
    answer = item.meta.get("answer")
    return [
        normalise_evalai(str(one))
        for one in (answer if isinstance(answer, list) else [] if answer is None else [answer])
    ]


def _measure(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile) -> MetricValues:
    """Accuracy over rows with an `answer`: the prediction equals one of its values after EvalAI normalisation."""
    known = [(item, accepted) for item in items if (accepted := _accepted(item))]
    right = [normalise_evalai(texts.get(item.id, "")) in accepted for item, accepted in known]
    return {"accuracy": 100 * sum(right) / len(right)} if right else {}


TASKS = (
    Task(
        name="custom",
        title="custom questions",
        folder="",
        official=CROPPED,
        headline="accuracy",
        needs=(
            RequiredFile(
                "questions",
                ("questions.jsonl",),
                'yours: one {"question_id": 1, "image": "a.jpg", "text": "What is this?"} a line, perhaps with '
                '"answer"',
            ),
        ),
        read=_read,
        measure=_measure,
    ),
)

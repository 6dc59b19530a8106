"""MME: per task 100 * accuracy + 100 * acc+ (share of images with both questions right), summed by group.

Sources: LLaVA's convert_answer_to_mme.py (`convert`: answers to a text file per task) and MME's calculation.py
(`calculate`: scores from those files). The intermediate files are kept as text, because the official tool reads lines:
a line break or tab in an answer breaks its pairing.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.metrics.arithmetic import add_in_order, ratio
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
DIRECTIVE, SUFFIX = "Answer the question using a single word or phrase.", " Please answer yes or no."
PREFIX = 4  # number of first characters searched for yes or no
Truth = Mapping[tuple[str, str, str], str]  # (task, "NAME.txt", question) -> Yes or No


@dataclass(frozen=True)
class MmeAnswer:
    """Answer to one question; `question_id` is "task/.../NAME.jpg"."""

    question_id: str
    prompt: str
    text: str


@dataclass(frozen=True)
class MmeTask:
    """Accuracies between 0 and 1, `score` of 200 points, and `other`: number of answers without yes or no."""

    accuracy: float
    accuracy_plus: float
    score: float
    other: int


@dataclass(frozen=True)
class MmeScores:
    """Perception (of 2000) and cognition (of 800) in points; NaN when a task of the group is absent."""

    perception: float
    cognition: float
    tasks: dict[str, MmeTask]

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.perception


def parse_truth(task: str, file_name: str, text: str) -> dict[tuple[str, str, str], str]:
    """Parse one official file. Raises DataError for a line that is not question, tab, answer."""
    truth = {}
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        fields = line.strip().split("\t")
        if len(fields) != 2:
            raise DataError(
                f"{task}/{file_name}:{number}: {line!r} is not a question, a tab and Yes or No; take the file from "
                "MME's release"
            )
        truth[task, file_name, fields[0]] = fields[1]
    return truth


def convert(answers: Iterable[MmeAnswer], truth: Truth, *, profile: Profile = OFFICIAL) -> dict[str, str]:
    """Build the result file of each task: image file, question, truth and answer separated by tabs.

    Lines are in the order of `answers`. The short-answer directive of a prompt is replaced by MME's own suffix, after
    one space, or two where only that question exists. Raises DataError for an unknown question. `corrected`: white
    space in an answer becomes single spaces.
    """
    files: dict[str, str] = {}
    for answer in answers:
        parts = answer.question_id.split("/")
        task, name = parts[0], parts[-1].split(".")[0] + ".txt"
        question = answer.prompt.replace(DIRECTIVE, "").strip() if DIRECTIVE in answer.prompt else answer.prompt
        if SUFFIX.strip() not in question:
            question += SUFFIX
            if (task, name, question) not in truth:
                question = question.replace(SUFFIX, " " + SUFFIX)
        if (task, name, question) not in truth:
            raise DataError(
                f"MME has no question {question!r} in {task}/{name}; questions, or answers, and text files are of "
                "different releases"
            )
        text = answer.text if profile is OFFICIAL else " ".join(answer.text.split())
        files[task] = files.get(task, "") + "\t".join((name, question, truth[task, name, question], text)) + "\n"
    return files


def parse(text: str, *, profile: Profile = OFFICIAL) -> str:
    """Return yes, no or other: the first of yes and no that the first 4 lower-cased characters contain.

    "Snow" is a no. `corrected`: the first word decides.
    """
    text = text.lower()
    if profile is not OFFICIAL:
        word = re.search(r"\w+", text)
        return word[0] if word and word[0] in ("yes", "no") else "other"
    return next((word for word in ("yes", "no") if word in text[:PREFIX]), "other")


def calculate(files: Mapping[str, str], *, profile: Profile = OFFICIAL) -> MmeScores:
    """Compute scores from the result files by task.

    Two lines are one image; a line without exactly 4 fields is skipped, but its image counts in acc+.

    Raises DataError for an odd number of lines and for a ground truth that is neither yes nor no. `corrected`: see
    `parse` and `convert`.
    """
    tasks = {task: _task(task, text, profile) for task, text in files.items()}

    def total(names: tuple[str, ...]) -> float:
        return add_in_order(tasks[name].score if name in tasks else math.nan for name in names)

    return MmeScores(total(PERCEPTION), total(COGNITION), tasks)


def _task(task: str, text: str, profile: Profile) -> MmeTask:
    lines = io.StringIO(text, newline=None).readlines()
    if len(lines) % 2:
        raise DataError(
            f"{task}.txt has {len(lines)} lines, not two per image; an answer is missing, or has a line break (profile "
            "corrected)"
        )
    outcomes: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines):
        fields = line.split("\t")
        if len(fields) != 4:
            continue
        truth = fields[2].lower()
        if truth not in ("yes", "no"):
            raise DataError(
                f"{task}.txt:{number + 1}: the truth is {fields[2]!r}, not Yes or No; convert the answers again"
            )
        outcomes.append((number // 2, truth, parse(fields[3], profile=profile)))
    images = [image for image, truth, prediction in outcomes if truth == prediction]
    accuracy = ratio(len(images), len(outcomes))
    plus = ratio(sum(images.count(image) == 2 for image in set(images)), len(lines) // 2)
    return MmeTask(
        accuracy, plus, accuracy * 100 + plus * 100, sum(prediction == "other" for _, _, prediction in outcomes)
    )

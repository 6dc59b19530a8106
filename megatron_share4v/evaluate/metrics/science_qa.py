"""ScienceQA: letter parsed from the answer; accuracy over the split and over questions with an image.

Source: LLaVA eval_science_qa.py (its random choice for answers without a letter is unreachable code).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_share4v.evaluate.metrics.arithmetic import ratio
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile

OPTIONS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the unescaped period requires any character but a line break
SENTENCE_CORRECTED = re.compile(r"The answer is ([A-Z])\b")


@dataclass(frozen=True)
class ScienceProblem:
    """Problem with the index of the right answer; `choices` is the number of choices."""

    id: str
    answer: int
    choices: int


@dataclass(frozen=True)
class ScienceAnswer:
    """Predicted text and the prompt recorded in the answer file."""

    text: str
    prompt: str


@dataclass(frozen=True)
class ScienceScores:
    """Accuracies in percent, not rounded, with their counts."""

    accuracy: float
    image_accuracy: float
    correct: int
    total: int
    image_correct: int
    image_total: int

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.image_accuracy


def parse(text: str, *, profile: Profile = OFFICIAL) -> str:
    """Parse the letter: `text` is one of A-E, starts as in "A. ", or has "The answer is X." exactly once; else FAILED.

    `corrected`: also accepts surrounding spaces, "A." alone, the sentence at the end without a period, and the sentence
    repeated with the same letter.
    """
    sentence = SENTENCE
    if profile is not OFFICIAL:
        sentence, text = SENTENCE_CORRECTED, text.strip()
        text = text[:-1] if text[:-1] in OPTIONS and text.endswith(".") else text
    if text in OPTIONS:
        return text
    if text[:1] in OPTIONS and text[1:3] == ". ":
        return text[0]
    letters = sentence.findall(text)
    if profile is not OFFICIAL:
        letters = list(dict.fromkeys(letters))
    return letters[0] if len(letters) == 1 else FAILED


def score(
    problems: Sequence[ScienceProblem], answers: Mapping[str, ScienceAnswer], *, profile: Profile = OFFICIAL
) -> ScienceScores:
    """Compute both accuracies; image questions are those with "<image>" in the answer's prompt.

    A problem without an answer is wrong and is not an image question. A letter beyond the problem's choices is wrong.
    `corrected`: see `parse`.
    """
    outcomes = []
    for problem in problems:
        answer = answers.get(problem.id, ScienceAnswer(FAILED, "Unknown"))
        letter = parse(answer.text, profile=profile)
        right = letter in OPTIONS[: problem.choices] and OPTIONS.index(letter) == problem.answer
        outcomes.append((right, "<image>" in answer.prompt))
    correct, total = sum(right for right, _ in outcomes), len(outcomes)
    image_correct, image_total = sum(right for right, image in outcomes if image), sum(image for _, image in outcomes)
    return ScienceScores(
        ratio(correct, total) * 100, ratio(image_correct, image_total) * 100, correct, total, image_correct, image_total
    )

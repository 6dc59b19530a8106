"""Soft accuracy over human answers: VQA-v2 (VQAEval), TextVQA (m4c) and VizWiz.

An answer earns min(1, matches / 3), averaged over leaving out each annotator in turn. The three differ in the
normaliser, in when it applies, and in their sums. Sources: GT-Vision-Lab/VQA vqaEval.py; LLaVA eval_textvqa.py and
m4c_evaluator.py; lmms-eval's vizwiz_vqa (VizWiz's own server is not public).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.metrics.arithmetic import add_in_order, average
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.metrics.vqa_answers import normalise_evalai, normalise_vqa_eval, trim

ANNOTATORS = 10  # of a TextVQA question
OCR_MARK = "Reference OCR token: "


@dataclass(frozen=True)
class VqaItem:
    """One prediction with the annotators' answers; the types matter to VQA-v2's tables only."""

    prediction: str
    answers: Sequence[str]
    question_type: str = ""
    answer_type: str = ""


@dataclass(frozen=True)
class VqaScores:
    """VQA-v2 accuracies in percent, rounded to 2 decimals like VQAEval."""

    overall: float
    by_question_type: dict[str, float]
    by_answer_type: dict[str, float]
    by_question: tuple[float, ...]

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.overall


@dataclass(frozen=True)
class SoftAccuracy:
    """Soft accuracy in percent, not rounded."""

    accuracy: float
    samples: int

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.accuracy


def leave_one_out(prediction: str, answers: Sequence[str]) -> list[float]:
    """Return min(1, matches among the others / 3) for each left-out annotator."""
    same = [answer == prediction for answer in answers]
    return [min(1.0, (sum(same) - one) / 3) for one in same]


def vqa_accuracy(items: Sequence[VqaItem], *, profile: Profile = OFFICIAL) -> VqaScores:
    """Compute VQAEval accuracy: both sides are normalised only if the trimmed human answers differ; where they
    agree, the comparison is literal, case included.

    `corrected`: they are always normalised (a "Two" for ten times "two" counts), and all periods go.
    """
    scores: list[float] = []
    for item in items:
        prediction, answers = trim(item.prediction), [trim(answer) for answer in item.answers]
        if len(set(answers)) > 1 or profile is not OFFICIAL:
            prediction = normalise_vqa_eval(prediction, profile=profile)
            answers = [normalise_vqa_eval(answer, profile=profile) for answer in answers]
        scores.append(average(leave_one_out(prediction, answers)))
    return VqaScores(
        overall=_rounded(scores),
        by_question_type=_by([item.question_type for item in items], scores),
        by_answer_type=_by([item.answer_type for item in items], scores),
        by_question=tuple(round(100 * score, 2) for score in scores),
    )


def _rounded(scores: Sequence[float]) -> float:
    return round(100 * add_in_order(scores) / len(scores), 2) if scores else average(scores)


def _by(kinds: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    return {
        kind: _rounded([score for other, score in zip(kinds, scores) if other == kind]) for kind in dict.fromkeys(kinds)
    }


def textvqa_accuracy(items: Sequence[VqaItem], *, profile: Profile = OFFICIAL) -> SoftAccuracy:
    """Compute m4c accuracy: everything is normalised.

    Raises DataError unless each question has 10 human answers. `corrected`: all periods go.
    """
    scores = []
    for number, item in enumerate(items):
        if len(item.answers) != ANNOTATORS:
            raise DataError(
                f"TextVQA question {number} has {len(item.answers)} answers, not {ANNOTATORS}; take the official "
                "annotation file"
            )
        answers = [normalise_evalai(answer, profile=profile) for answer in item.answers]
        scores.append(average(leave_one_out(normalise_evalai(item.prediction, profile=profile), answers)))
    return SoftAccuracy(100.0 * average(scores), len(scores))


def textvqa_question(prompt: str) -> str:
    """Extract the lower-cased question from the prompt of an answer file; with the image id it is TextVQA's key.

    Raises DataError for other prompts.
    """
    lines = prompt.split("\n")
    legacy = (
        re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL) if prompt.startswith("OCR tokens: ") else None
    )
    if legacy:
        question = legacy[1]
    elif OCR_MARK in prompt and len(lines) == 3 and not prompt.startswith("OCR tokens: "):
        question = lines[1] if prompt.startswith(OCR_MARK.rstrip()) else lines[0]
    elif len(lines) == 2 and not prompt.startswith("OCR tokens: "):
        question = lines[0]
    else:
        raise DataError(
            f"no TextVQA question in the prompt {prompt!r}: expected question, OCR tokens (optional) and directive, a "
            "line each"
        )
    return question.lower()


def vizwiz_accuracy(items: Iterable[VqaItem]) -> SoftAccuracy:
    """Compute VizWiz accuracy: everything is normalised like EvalAI; exact means, so that the order of answers
    cannot matter; a question without answers scores 0.
    """
    scores = []
    for item in items:
        answers = [normalise_evalai(answer) for answer in item.answers]
        earned = leave_one_out(normalise_evalai(item.prediction), answers)
        scores.append(float(statistics.mean(earned)) if earned else 0.0)
    return SoftAccuracy(100.0 * average(scores), len(scores))

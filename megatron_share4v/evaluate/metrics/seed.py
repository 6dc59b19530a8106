"""SEED-Bench accuracy by question type, in total and over image questions, which is the published number.

The answer must be exactly the letter.

Source: ShareGPT4V's convert_seed_for_submission.py (LLaVA's script with an option to compare only the first character).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_share4v.evaluate.metrics.arithmetic import ratio


@dataclass(frozen=True)
class SeedQuestion:
    """Question with the id of the annotations: a number, a number as text, or text ("v12")."""

    id: int | str
    answer: str
    type_id: int
    data_type: str = "image"


@dataclass(frozen=True)
class SeedScores:
    """Accuracies in percent, not rounded; `video` is NaN without video questions."""

    total: float
    image: float
    video: float
    by_type: dict[int, float]

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.image


def is_right(text: str, answer: str, *, tolerant: bool = False) -> bool:
    """Return whether `text` is the letter, or with `tolerant` begins with it ("Blue" is a B)."""
    return text == answer or (tolerant and text[:1] == answer)


def score(questions: Sequence[SeedQuestion], answers: Mapping[int | str, str], *, tolerant: bool = False) -> SeedScores:
    """Compute accuracies; a question without an answer is wrong.

    answers: texts by question_id of the answer file, where numeric ids are integers.
    """
    right = [
        _answered(question.id, answers) and is_right(answers[_key(question.id)], question.answer, tolerant=tolerant)
        for question in questions
    ]

    def share(chosen: Sequence[bool]) -> float:
        picked = [is_correct for is_correct, is_chosen in zip(right, chosen) if is_chosen]
        return ratio(sum(picked), len(picked)) * 100

    return SeedScores(
        total=share([True] * len(questions)),
        image=share([question.data_type == "image" for question in questions]),
        video=share([question.data_type == "video" for question in questions]),
        by_type={
            kind: share([q.type_id == kind for q in questions]) for kind in sorted({q.type_id for q in questions})
        },
    )


def _key(question_id: int | str) -> int | str:
    """Convert a numeric text id to an integer."""
    try:
        return int(question_id)
    except ValueError:
        return question_id


def _answered(question_id: int | str, answers: Mapping[int | str, str]) -> bool:
    return _key(question_id) in answers

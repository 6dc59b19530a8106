"""SEED-Bench: the answer's text must be the letter.

Per question type, in total, and for the image questions, which is the paper's number.

Source: ShareGPT4V's convert_seed_for_submission.py (LLaVA's with an option to look at the first character only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_share4v.evaluate.metrics.arithmetic import ratio


@dataclass(frozen=True)
class SeedQuestion:
    """`id` as the annotations have it: a number, also as text, or text ("v12")."""

    id: int | str
    answer: str
    type_id: int
    data_type: str = "image"


@dataclass(frozen=True)
class SeedScores:
    """Percent, not rounded. `video` is nan without video questions."""

    total: float
    image: float
    video: float
    by_type: dict[int, float]

    @property
    def headline(self) -> float:
        return self.image


def is_right(text: str, answer: str, *, tolerant: bool = False) -> bool:
    """`text` is the letter; `tolerant`: or begins with it, whatever follows ("Blue" is a B)."""
    return text == answer or (tolerant and text[:1] == answer)


def score(questions: Sequence[SeedQuestion], answers: Mapping[int | str, str], *, tolerant: bool = False) -> SeedScores:
    """`answers`: texts by the answer file's question_id, where a number is a number.

    A question without an answer is wrong.
    """
    right = [
        _answered(question.id, answers) and is_right(answers[_key(question.id)], question.answer, tolerant=tolerant)
        for question in questions
    ]

    def share(chosen: Sequence[bool]) -> float:
        picked = [one for one, wanted in zip(right, chosen) if wanted]
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
    """Text that is a number is looked up as the number, and only so."""
    try:
        return int(question_id)
    except ValueError:
        return question_id


def _answered(question_id: int | str, answers: Mapping[int | str, str]) -> bool:
    return _key(question_id) in answers

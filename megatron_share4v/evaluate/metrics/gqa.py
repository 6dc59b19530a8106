"""GQA accuracy by exact match: over all questions, binary questions (answer is a choice) and open questions.

Sources: GQA's eval.py (without validity, plausibility and distribution, whose files testdev lacks); LLaVA's
convert_gqa_for_eval.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_share4v.errors import DataError


@dataclass(frozen=True)
class GqaQuestion:
    """A question with its answer and structural type."""

    id: str
    answer: str
    structural: str  # types.structural of the official file: query, verify, choose, logical, compare
    balanced: bool = True


@dataclass(frozen=True)
class GqaScores:
    """GQA accuracies in percent, not rounded. 0 for a kind without questions, as in eval.py."""

    accuracy: float
    binary: float
    open: float
    by_structure: dict[str, float]
    questions: int

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.accuracy


def convert(text: str) -> str:
    """Convert a prediction like the official converter: drop trailing periods, lower-case. Spaces stay."""
    return text.rstrip(".").lower()


def score(questions: Sequence[GqaQuestion], predictions: Mapping[str, str]) -> GqaScores:
    """Score converted predictions by question id.

    Only balanced questions count. Raises DataError when one of these has no prediction.
    """
    scored = [question for question in questions if question.balanced]
    missing = [question.id for question in scored if question.id not in predictions]
    if missing:
        raise DataError(
            f"GQA: no prediction for {len(missing)} of {len(scored)} questions, the first is {missing[0]}; finish the "
            "run first"
        )
    right = {question.id: predictions[question.id] == question.answer for question in scored}

    def share(chosen: Sequence[GqaQuestion]) -> float:
        return sum(right[question.id] for question in chosen) / len(chosen) * 100 if chosen else 0.0

    return GqaScores(
        accuracy=share(scored),
        binary=share([question for question in scored if question.structural != "query"]),
        open=share([question for question in scored if question.structural == "query"]),
        by_structure={
            kind: share([q for q in scored if q.structural == kind]) for kind in sorted({q.structural for q in scored})
        },
        questions=len(scored),
    )

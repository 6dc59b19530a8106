"""Q-Bench A1 (LLVisionQA): scores a response by its first letter or by the text of the right candidate.

Source: qbench_eval.py of LLaVA's playground.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_share4v.evaluate.metrics.arithmetic import ratio
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile


@dataclass(frozen=True)
class QbenchAnswer:
    """Response with its candidates; `correct` is the text of the right one."""

    response: str
    candidates: Sequence[str]
    correct: str


@dataclass(frozen=True)
class QbenchScores:
    """Accuracy between 0 and 1 over all lines of the answer file, including repeated ones."""

    accuracy: float
    correct: int
    total: int

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return 100 * self.accuracy


def is_right(answer: QbenchAnswer, *, profile: Profile = OFFICIAL) -> bool:
    """Return whether the first character is the letter of the right candidate, or the response is its text.

    The text may also be followed by a space. Words count by their first letter: "Blurry" is a B. An empty response
    stops the script; here it is wrong. `corrected`: the letter must be a word of its own; surrounding white space and
    case are ignored.
    """
    response, correct = answer.response, answer.correct
    if profile is not OFFICIAL:
        response, correct = response.strip(), correct.strip().lower()
        letter = re.match(r"\(?([A-Z])\b", response)
        named = (
            answer.candidates[ord(letter[1]) - ord("A")]
            if letter and ord(letter[1]) - ord("A") < len(answer.candidates)
            else ""
        )
        return correct in (named.strip().lower(), response.rstrip(".").lower())
    if not response:
        return False
    place = ord(response[0]) - ord("A")
    if 0 <= place < len(answer.candidates) and answer.candidates[place] == correct:
        return True
    return correct in (response.split(" ")[0], response)


def score(answers: Sequence[QbenchAnswer], *, profile: Profile = OFFICIAL) -> QbenchScores:
    """Compute the accuracy. `corrected`: see `is_right`."""
    correct = sum(is_right(answer, profile=profile) for answer in answers)
    return QbenchScores(ratio(correct, len(answers)), correct, len(answers))

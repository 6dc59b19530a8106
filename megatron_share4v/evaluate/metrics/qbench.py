"""Q-Bench A1 (LLVisionQA): the first character of the response as a letter, or the text of the right candidate.

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
    """`correct` is the right candidate's text."""

    response: str
    candidates: Sequence[str]
    correct: str


@dataclass(frozen=True)
class QbenchScores:
    """`accuracy`: share between 0 and 1, of all lines of the answer file, repeated ones included."""

    accuracy: float
    correct: int
    total: int

    @property
    def headline(self) -> float:
        return 100 * self.accuracy


def is_right(answer: QbenchAnswer, *, profile: Profile = OFFICIAL) -> bool:
    """The first character names the right candidate (A is the first), or the text up to the first space, or all of
    it, is that candidate.

    A word counts by its first letter too: "Blurry" is a B. An empty response stops the script; here it is wrong.
    `corrected`: the letter must stand alone, and white space around the response and case in the texts do not matter.
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
    """`corrected`: see `is_right`."""
    correct = sum(is_right(answer, profile=profile) for answer in answers)
    return QbenchScores(ratio(correct, len(answers)), correct, len(answers))

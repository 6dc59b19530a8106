"""MMBench: option inference without a judge, circular evaluation over rotations, and accuracy by ability.

Source: VLMEvalKit matching_util.py (can_infer) and multiple_choice.py (circular evaluation, report_acc). Published
numbers come from the server, which asks GPT-3.5 where no option is inferred: pass such letters as `judged`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_share4v.evaluate.metrics.arithmetic import ratio

API_FAILURE = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NONE_OF_THEM = "Z"
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4  # the letter must be among the last words
ROTATION = 1e6  # index distance between a question and its rotations
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


@dataclass(frozen=True)
class MmbenchRow:
    """A row of the TSV with its prediction.

    choices: option texts by letter, without absent options. answer: letter of the right option in this row.
    """

    index: int
    answer: str
    prediction: str
    choices: Mapping[str, str]
    category: str = ""
    l2_category: str = ""


@dataclass(frozen=True)
class MmbenchScores:
    """MMBench accuracies between 0 and 1.

    by_l2: by official abbreviation. open_rows: indices without an inferred option or a judged letter.
    """

    overall: float
    by_l2: dict[str, float]
    by_category: dict[str, float]
    hits: dict[int, bool] = field(repr=False)
    open_rows: tuple[int, ...]

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return 100 * self.overall


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """Infer the option letter: exactly one is a word of its own, first within the last 4 words.

    Z for a refusal or a single Z.
    """
    if API_FAILURE in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(SEPARATORS).split()
    present = [letter for letter in choices if letter in words]
    if len(present) == 1 and words.index(present[0]) >= len(words) - LAST_WORDS:
        return present[0]
    return NONE_OF_THEM if not present and NONE_OF_THEM in words else None


def infer_text(answer: str, choices: Mapping[str, str]) -> str | None:
    """Infer the only option whose text the answer contains, ignoring case; None when the answer is longer than twice
    all options together.
    """
    answer = answer.lower()
    if len(answer) > 2 * sum(len(text) for text in choices.values()):
        return None
    contained = [letter for letter, text in choices.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else None


def infer(answer: str, choices: Mapping[str, str]) -> str | None:
    """Infer the option by letter, else by text (can_infer). None where the official script asks a judge."""
    return infer_option(answer, choices) or infer_text(answer, choices)


def score(rows: Sequence[MmbenchRow], *, judged: Mapping[int, str] | None = None) -> MmbenchScores:
    """Score the rows of one split.

    A question is right when its row and all its present rotations (index + n * 1e6) are right.

    judged: letters by index for rows where `infer` finds none; such a row is wrong without one. Rotations whose
    question is missing are ignored.
    """
    judged = judged or {}
    letters = [infer(row.prediction, row.choices) or judged.get(row.index) for row in rows]
    hits: dict[int, bool] = {}
    for row, letter in zip(rows, letters):
        group = int(row.index % ROTATION)
        hits[group] = hits.get(group, True) and letter == row.answer
    questions = [row for row in rows if row.index == int(row.index % ROTATION)]

    def share(chosen: Sequence[MmbenchRow]) -> float:
        return ratio(sum(hits[row.index] for row in chosen), len(chosen))

    l2, categories = (
        sorted({row.l2_category for row in questions} - {""}),
        sorted({row.category for row in questions} - {""}),
    )
    return MmbenchScores(
        overall=share(questions),
        by_l2={
            ABBREVIATIONS.get(name, name): share([row for row in questions if row.l2_category == name]) for name in l2
        },
        by_category={name: share([row for row in questions if row.category == name]) for name in categories},
        hits={row.index: hits[row.index] for row in questions},
        open_rows=tuple(row.index for row, letter in zip(rows, letters) if letter is None),
    )

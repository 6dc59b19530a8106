"""POPE: yes or no from the first sentence; accuracy, precision, recall, F1 and ratio of yes.

Sources: AoiDragon/POPE evaluate.py, LLaVA eval_pope.py. The paper's number is the mean F1 of the splits random, popular
and adversarial.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_share4v.evaluate.metrics.arithmetic import average, ratio
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile

NO_WORDS = {"No", "no", "not"}


@dataclass(frozen=True)
class PopeScores:
    """Confusion counts with "yes" as the positive class; metrics between 0 and 1, not rounded."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


@dataclass(frozen=True)
class PopeMeans:
    """Means over the splits, between 0 and 1."""

    f1: float
    accuracy: float
    yes_ratio: float

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return 100 * self.f1


def parse(text: str, *, profile: Profile = OFFICIAL) -> str:
    """Return "no" if the first sentence has No, no or not as a word, else "yes" (also for an empty text).

    The sentence ends at the first period; commas are deleted; words are separated by single spaces. `corrected`: words
    in any case and between any other characters ("NO", "no\\n", "No!") and words ending in n't count.
    """
    sentence = text.split(".")[0]
    if profile is OFFICIAL:
        words = set(sentence.replace(",", "").split(" "))
        return "no" if words & NO_WORDS else "yes"
    return "no" if re.search(r"\b(no|not)\b|n't\b", sentence.lower()) else "yes"


def score(answers: Sequence[str], labels: Sequence[str], *, profile: Profile = OFFICIAL) -> PopeScores:
    """Score one split; texts and labels are in the same order, and any label but "no" is a yes.

    As in the script, answers without a label and labels without an answer are dropped, except from the ratio of yes.
    Without predicted or labelled yes the script divides by zero and stops; precision, recall or F1 are NaN here.
    `corrected`: these are 0; see also `parse`.
    """
    predicted_yes = [parse(text, profile=profile) == "yes" for text in answers]
    pairs = list(zip(predicted_yes, (label != "no" for label in labels)))
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    if profile is not OFFICIAL:
        precision, recall = (0.0 if math.isnan(share) else share for share in (precision, recall))
    f1 = ratio(2 * precision * recall, precision + recall)
    if profile is not OFFICIAL and math.isnan(f1):
        f1 = 0.0
    return PopeScores(
        tp,
        fp,
        tn,
        fn,
        ratio(tp + tn, len(pairs)),
        precision,
        recall,
        f1,
        ratio(predicted_yes.count(True), len(predicted_yes)),
    )


def mean(splits: Sequence[PopeScores]) -> PopeMeans:
    """Average F1, accuracy and ratio of yes over splits."""
    return PopeMeans(
        average([s.f1 for s in splits]), average([s.accuracy for s in splits]), average([s.yes_ratio for s in splits])
    )

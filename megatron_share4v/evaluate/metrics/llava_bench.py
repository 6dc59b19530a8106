"""LLaVA-Bench-in-the-Wild: scores parsed from judge reviews, and the model's mean relative to the reference's.

Sources: LLaVA eval_gpt_review_bench.py (parse) and summarize_gpt_review.py (the version of ShareGPT4V, which also
prints both means).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_share4v.evaluate.metrics.arithmetic import average, ratio
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile

FAILED = (-1.0, -1.0)
ALL = "all"


@dataclass(frozen=True)
class Review:
    """Parsed review: `scores` of the reference and the model.

    category: llava_bench_conv, llava_bench_detail or llava_bench_complex.
    """

    category: str
    scores: tuple[float, float]


@dataclass(frozen=True)
class Relative:
    """Relative score in percent and both means times 10, rounded to 1 decimal.

    failed: number of reviews that did not parse.
    """

    relative: float
    reference: float
    model: float
    failed: int


@dataclass(frozen=True)
class LlavaBenchScores:
    """Scores by category in alphabetical order, including "all"."""

    by_category: dict[str, Relative]

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.by_category[ALL].relative


def parse_review(review: str, *, profile: Profile = OFFICIAL) -> tuple[float, float]:
    """Parse the two scores on the first line, separated by one comma or space; return FAILED for anything else.

    "8, 7" and "8 7 " fail. `corrected`: any commas and spaces may separate and surround the scores, and each must be
    between 1 and 10.
    """
    line = review.split("\n")[0].replace(",", " ")
    fields = line.split(" ") if profile is OFFICIAL else line.split()
    if len(fields) != 2:
        return FAILED
    try:
        first, second = (float(one) for one in fields)
    except ValueError:
        return FAILED
    return (first, second) if profile is OFFICIAL or (1 <= first <= 10 and 1 <= second <= 10) else FAILED


def summarise(reviews: Sequence[Review], *, profile: Profile = OFFICIAL) -> LlavaBenchScores:
    """Compute relative scores from means rounded to 3 decimals.

    A failed review counts as -1 for both sides, so that failures alone give 100. `corrected`: failed reviews are
    excluded.
    """
    names = sorted({review.category for review in reviews} | {ALL})
    return LlavaBenchScores(
        {name: _relative([r.scores for r in reviews if name in (ALL, r.category)], profile) for name in names}
    )


def _relative(scores: Sequence[tuple[float, float]], profile: Profile) -> Relative:
    failed = sum(pair == FAILED for pair in scores)
    if profile is not OFFICIAL:
        scores = [pair for pair in scores if pair != FAILED]
    if not scores:
        return Relative(math.nan, math.nan, math.nan, failed)
    reference, model = (round(average([pair[side] for pair in scores]), 3) for side in (0, 1))
    return Relative(round(ratio(model, reference) * 100, 1), round(reference * 10, 1), round(model * 10, 1), failed)

"""MM-Vet: grades between 0 and 1 parsed from judge replies, and their means by capability and combination.

Source: yuweihao/MM-Vet mm-vet_evaluator.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.metrics.arithmetic import add_in_order, average, numpy_round
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile

MAX_REPLIES = 5  # the script requests a sixth reply but ignores it and gives 0.0
TOTAL = ("total", "")


@dataclass(frozen=True)
class MmVetScores:
    """MM-Vet scores in percent, rounded to 1 decimal.

    std: population standard deviation over runs. Capabilities and combinations with most questions come first.
    """

    total: float
    std: float
    runs: tuple[float, ...]
    by_capability: dict[str, float]
    by_combination: dict[str, float]

    @property
    def headline(self) -> float:
        """Score in the paper's table."""
        return self.total


def parse_grade(reply: str, *, profile: Profile = OFFICIAL) -> float | None:
    """Parse the text up to the first space as a number in [0, 1]; None means retry. `corrected`: "nan" is invalid."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    if grade > 1.0 or grade < 0.0 or (profile is not OFFICIAL and math.isnan(grade)):
        return None
    return grade


def first_grade(replies: Iterable[str], *, profile: Profile = OFFICIAL) -> float | None:
    """Return the first grade among at most 5 replies; None without one. `corrected`: see `parse_grade`."""
    for _, reply in zip(range(MAX_REPLIES), replies):
        found = parse_grade(reply, profile=profile)
        if found is not None:
            return found
    return None


def grade(replies: Iterable[str], *, profile: Profile = OFFICIAL) -> float:
    """Return the first grade among at most 5 replies; 0.0 without one. `corrected`: see `parse_grade`."""
    found = first_grade(replies, profile=profile)
    return 0.0 if found is None else found


def aggregate(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Sequence[str]]) -> MmVetScores:
    """Aggregate grades by capability.

    grades: one per run, by question id. capabilities: by question id, in any order. Each question counts for each of
    its capabilities.

    Raises DataError when a question has no grades or a different number of runs. Bit-identical to NumPy for up to 7
    runs; NumPy sums more in pairs.
    """
    unmatched = set(grades) ^ set(capabilities)
    if unmatched or not grades:
        raise DataError(
            f"MM-Vet: {len(unmatched)} questions lack grades or annotations ({sorted(unmatched)[:3]}); finish grading"
        )
    runs = len(next(iter(grades.values())))
    if any(len(row) != runs for row in grades.values()) or not runs:
        raise DataError(
            f"MM-Vet: questions have between {min(map(len, grades.values()))} and {max(map(len, grades.values()))} "
            "runs of grades"
        )
    sums: dict[tuple[str, str], list[float]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for question, row in grades.items():
        names = sorted(set(capabilities[question]))
        for key in (*(("one", name) for name in names), ("all", "_".join(names)), TOTAL):
            counts[key] += 1
            sums[key] = [total + one for total, one in zip(sums.get(key, [0.0] * runs), row)]
    points = {key: [total / counts[key] * 100 for total in totals] for key, totals in sums.items()}
    mean = average(points[TOTAL])

    def means(kind: str) -> dict[str, float]:
        keys = sorted((key for key in points if key[0] == kind), key=lambda key: (-counts[key], key))
        return {name: numpy_round(average(points[kind, name]), 1) for _, name in keys}

    return MmVetScores(
        total=numpy_round(mean, 1),
        std=numpy_round(math.sqrt(add_in_order((one - mean) * (one - mean) for one in points[TOTAL]) / runs), 1),
        runs=tuple(numpy_round(one, 1) for one in points[TOTAL]),
        by_capability=means("one"),
        by_combination=means("all"),
    )

"""LLaVA-Bench: review parsing and relative scores, and detection of port errors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
from port_errors import Row, catches, names, rows, same

from megatron_share4v.evaluate.metrics import llava_bench
from megatron_share4v.evaluate.metrics.llava_bench import FAILED, Review
from megatron_share4v.evaluate.metrics.profile import CORRECTED

# quirk, review, scores, corrected scores where they differ
REVIEWS: list[tuple] = [
    ("two numbers", "8 7", (8.0, 7.0)),
    ("two numbers and an explanation", "8 7\nThe first is better.", (8.0, 7.0)),
    ("halves", "8.5 7.5", (8.5, 7.5)),
    ("comma without space", "8,7", (8.0, 7.0)),
    ("comma and space", "8, 7", FAILED, (8.0, 7.0)),
    ("two spaces", "8  7", FAILED, (8.0, 7.0)),
    ("space before", " 8 7", FAILED, (8.0, 7.0)),
    ("space after", "8 7 ", FAILED, (8.0, 7.0)),
    ("line break before", "\n8 7", FAILED),
    ("carriage return", "8 7\r\nThe", (8.0, 7.0)),
    ("tab between", "8\t7", FAILED, (8.0, 7.0)),
    ("slash between", "8/7", FAILED),
    ("comma after", "8,7,", FAILED, (8.0, 7.0)),
    ("one number", "8", FAILED),
    ("three numbers", "8 7 6", FAILED),
    ("numbers on two lines", "8\n7", FAILED),
    ("nothing", "", FAILED),
    ("words", "eight seven", FAILED),
    ("labels", "Assistant 1: 8", FAILED),
    ("two words", "Both good", FAILED),
    ("period after", "8 7.", (8.0, 7.0)),
    ("out of ten", "8/10 7/10", FAILED),
    ("a decimal comma is a separator", "8,5", (8.0, 5.0)),
    ("decimal commas make four", "8,5 7,5", FAILED),
    ("ten", "10 10", (10.0, 10.0)),
    ("zero", "0 7", (0.0, 7.0), FAILED),
    ("beyond ten", "80 70", (80.0, 70.0), FAILED),
    ("negative", "-8 7", (-8.0, 7.0), FAILED),
    ("not a number", "nan 7", (math.nan, 7.0), FAILED),
    ("lowest and highest", "1 10", (1.0, 10.0)),
    ("highest and lowest", "10 1", (10.0, 1.0)),
    ("first one above the scale", "10.5 7", (10.5, 7.0), FAILED),
    ("second one above the scale", "8 10.5", (8.0, 10.5), FAILED),
    ("first one below the scale", "0.5 7", (0.5, 7.0), FAILED),
    ("second one below the scale", "8 0.5", (8.0, 0.5), FAILED),
    ("starred", "**8 7**", FAILED),
    ("scores on the second line", "Scores:\n8 7", FAILED),
    ("text after on the same line", "8 7 because", FAILED),
]
C, D, X = "llava_bench_conv", "llava_bench_detail", "llava_bench_complex"
# quirk, reviews; then by category: relative, reference times 10, model times 10, failed
SUMMARIES: list[tuple] = [
    ("one review", [(C, 8, 6)], {"all": (75.0, 80.0, 60.0, 0), C: (75.0, 80.0, 60.0, 0)}),
    ("better than the reference", [(C, 8, 10)], {"all": (125.0, 80.0, 100.0, 0), C: (125.0, 80.0, 100.0, 0)}),
    (
        "ratio of means, not mean of ratios",
        [(C, 10, 5), (C, 5, 5)],
        {"all": (66.7, 75.0, 50.0, 0), C: (66.7, 75.0, 50.0, 0)},
    ),
    (
        "all is by review, not by category",
        [(C, 10, 10), (C, 10, 10), (D, 10, 1)],
        {"all": (70.0, 100.0, 70.0, 0), C: (100.0, 100.0, 100.0, 0), D: (10.0, 100.0, 10.0, 0)},
    ),
    (
        "categories by name",
        [(D, 8, 4), (X, 8, 8), (C, 8, 2)],
        {"all": (58.3, 80.0, 46.7, 0), X: (100.0, 80.0, 80.0, 0), C: (25.0, 80.0, 20.0, 0), D: (50.0, 80.0, 40.0, 0)},
    ),
    (
        "a failed review counts as -1",
        [(C, 8, 6), (C, -1, -1)],
        {"all": (71.4, 35.0, 25.0, 1), C: (71.4, 35.0, 25.0, 1)},
    ),
    (
        "nothing but failed reviews make 100",
        [(C, -1, -1)],
        {"all": (100.0, -10.0, -10.0, 1), C: (100.0, -10.0, -10.0, 1)},
    ),
    ("the reference's mean is 0", [(C, 0, 5)], {"all": (math.nan, 0.0, 50.0, 0), C: (math.nan, 0.0, 50.0, 0)}),
    (
        "means are rounded before they are divided",
        [(C, 0.004, 0.0034)],
        {"all": (75.0, 0.0, 0.0, 0), C: (75.0, 0.0, 0.0, 0)},
    ),
    ("thirds", [(C, 9, 8), (C, 9, 8), (C, 8, 7)], {"all": (88.5, 86.7, 76.7, 0), C: (88.5, 86.7, 76.7, 0)}),
]


def summary(reviews: Sequence[tuple[str, float, float]]) -> dict[str, tuple[float, ...]]:
    scores = llava_bench.summarise([Review(category, (float(one), float(two))) for category, one, two in reviews])
    return {name: tuple(vars(relative).values()) for name, relative in scores.by_category.items()}


TABLE: list[Row] = rows(llava_bench, "parse_review", [(quirk, review, scores[0]) for quirk, review, *scores in REVIEWS])
TABLE += [(quirk, lambda reviews=reviews: summary(reviews), expected) for quirk, reviews, expected in SUMMARIES]
MENDED = [(quirk, review, scores[-1]) for quirk, review, *scores in REVIEWS]

parse_review, average, summarise = llava_bench.parse_review, llava_bench.average, llava_bench.summarise


def _first_two(review: str, **_: object) -> tuple[float, float]:
    found = re.findall(r"\d+(?:\.\d+)?", review)
    return (float(found[0]), float(found[1])) if len(found) > 1 else FAILED


def _zeros(review: str, **_: object) -> tuple[float, float]:
    found = parse_review(review)
    return (0.0, 0.0) if found == FAILED else found


def _rescaled(reviews: Sequence[Review], **_: object) -> llava_bench.LlavaBenchScores:
    """All as the mean of the categories."""
    found = summarise(reviews).by_category
    parts = [relative for name, relative in found.items() if name != "all"]
    overall = llava_bench.Relative(
        sum(part.relative for part in parts) / len(parts), *list(vars(found["all"]).values())[1:]
    )
    return llava_bench.LlavaBenchScores(found | {"all": overall})


def _swapped(reviews: Sequence[Review], **_: object) -> llava_bench.LlavaBenchScores:
    return summarise([Review(review.category, review.scores[::-1]) for review in reviews])


def _mean_of_ratios(scores: Sequence[tuple[float, float]], profile: object) -> llava_bench.Relative:
    relative = [two / one * 100 for one, two in scores if one]
    return llava_bench.Relative(round(sum(relative) / max(1, len(relative)), 1), 0.0, 0.0, 0)


PORT_ERRORS: dict[str, dict[str, object]] = {
    "split on any white space": {
        "parse_review": lambda review, **_: parse_review(" ".join(review.split("\n")[0].replace(",", " ").split()))
    },
    "stripped": {"parse_review": lambda review, **_: parse_review(review.strip())},
    "commas stay": {"parse_review": lambda review, **_: parse_review(review.replace(",", ";"))},
    "first two numbers": {"parse_review": _first_two},
    "failures are 0": {"parse_review": _zeros},
    "scores outside 1 to 10 refused": {"OFFICIAL": CORRECTED},
    "failures left out": {
        "summarise": lambda reviews, **_: summarise(
            [review for review in reviews if review.scores != FAILED] or [Review(C, (1.0, 1.0))]
        )
    },
    "mean of ratios": {"_relative": _mean_of_ratios},
    "all as the mean of categories": {"summarise": _rescaled},
    "model first": {"summarise": _swapped},
    "means not rounded": {"round": lambda value, decimals: value if decimals == 3 else round(value, decimals)},
    "means rounded to 1 decimal": {"round": lambda value, decimals: round(value, min(decimals, 1))},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_case(quirk: str, call, expected: object) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_bench, "round", round, raising=False)
    assert catches(TABLE, monkeypatch, llava_bench, PORT_ERRORS[name])


@pytest.mark.parametrize(("quirk", "review", "scores"), MENDED, ids=[row[0] for row in MENDED])
def test_corrected_scores(quirk: str, review: str, scores: tuple[float, float]) -> None:
    assert llava_bench.parse_review(review, profile=CORRECTED) == scores


def test_corrected_leaves_failed_reviews_out() -> None:
    reviews = [Review(C, (8.0, 6.0)), Review(D, FAILED)]
    scores = llava_bench.summarise(reviews, profile=CORRECTED)
    assert scores.headline == 75.0 and scores.by_category["all"].failed == 1
    assert math.isnan(scores.by_category[D].relative) and scores.by_category[D].failed == 1

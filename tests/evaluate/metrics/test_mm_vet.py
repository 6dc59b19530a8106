"""MM-Vet: grade parsing, retries and means by capability, and detection of port errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from port_errors import Row, catches, names, rows, same

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.metrics import mm_vet
from megatron_share4v.evaluate.metrics.profile import CORRECTED

REPLIES: list[tuple] = [
    ("grade", "0.5", 0.5),
    ("zero", "0.0", 0.0),
    ("one", "1.0", 1.0),
    ("whole number", "1", 1.0),
    ("no leading digit", ".5", 0.5),
    ("no trailing digit", "1.", 1.0),
    ("two decimals", "0.55", 0.55),
    ("exponent", "1e-1", 0.1),
    ("plus sign", "+0.5", 0.5),
    ("negative zero", "-0.0", -0.0),
    ("too large", "1.1", None),
    ("far too large", "10", None),
    ("negative", "-0.1", None),
    ("infinite", "inf", None),
    ("not a number is taken", "nan", math.nan),
    ("nothing", "", None),
    ("word", "half", None),
    ("text after a space", "0.5 because", 0.5),
    ("text before", "Correctness 0.5", None),
    ("space before", " 0.5", None),
    ("line break before", "\n0.5", 0.5),
    ("line break after", "0.5\n", 0.5),
    ("line break and text", "0.5\nbecause", None),
    ("tab and text", "0.5\tbecause", None),
    ("period after", "0.5.", None),
    ("comma for the point", "0,5", None),
    ("fraction", "1/2", None),
    ("percent", "50%", None),
    ("bar", "0.5|", None),
    ("bar after a space", "0.5 |", 0.5),
    ("quoted", '"0.5"', None),
]
RETRIES: list[tuple] = [
    ("first reply", ["0.3", "0.9"], 0.3),
    ("second reply", ["bad", "0.9"], 0.9),
    ("second reply after one out of range", ["2.0", "0.9"], 0.9),
    ("fifth reply", ["bad"] * 4 + ["0.9"], 0.9),
    ("the sixth is not read", ["bad"] * 5 + ["0.9"], 0.0),
    ("never", ["bad"] * 6, 0.0),
    ("zero is a grade", ["0.0", "0.9"], 0.0),
]
CAPABILITIES = {"v1_0": ["ocr", "math"], "v1_1": ["rec"], "v1_2": ["math", "ocr"], "v1_3": ["rec", "gen", "know"]}
# quirk, grades by run of the four questions; then total, std, runs, by capability, by combination
MEANS: list[tuple] = [
    (
        "all right",
        [[1.0] * 4],
        100.0,
        0.0,
        (100.0,),
        dict.fromkeys(["math", "ocr", "rec", "gen", "know"], 100.0),
        dict.fromkeys(["math_ocr", "gen_know_rec", "rec"], 100.0),
    ),
    (
        "capabilities in any order are one combination",
        [[1.0, 0.0, 0.5, 0.0]],
        37.5,
        0.0,
        (37.5,),
        {"math": 75.0, "ocr": 75.0, "rec": 0.0, "gen": 0.0, "know": 0.0},
        {"math_ocr": 75.0, "gen_know_rec": 0.0, "rec": 0.0},
    ),
    (
        "a question counts for each of its capabilities",
        [[0.0, 0.0, 0.0, 0.6]],
        15.0,
        0.0,
        (15.0,),
        {"math": 0.0, "ocr": 0.0, "rec": 30.0, "gen": 60.0, "know": 60.0},
        {"math_ocr": 0.0, "gen_know_rec": 60.0, "rec": 0.0},
    ),
    (
        "two runs",
        [[0.0, 0.4, 0.0, 0.0], [0.0, 0.8, 0.0, 0.0]],
        15.0,
        5.0,
        (10.0, 20.0),
        {"math": 0.0, "ocr": 0.0, "rec": 30.0, "gen": 0.0, "know": 0.0},
        {"math_ocr": 0.0, "gen_know_rec": 0.0, "rec": 60.0},
    ),
    (
        "rounded as NumPy does",
        [[0.006, 0.0, 0.0, 0.0]],
        0.2,
        0.0,
        (0.2,),
        {"math": 0.3, "ocr": 0.3, "rec": 0.0, "gen": 0.0, "know": 0.0},
        {"math_ocr": 0.3, "gen_know_rec": 0.0, "rec": 0.0},
    ),
    (
        "one decimal everywhere",
        [[0.3333, 0.0, 0.0, 0.0]],
        8.3,
        0.0,
        (8.3,),
        {"math": 16.7, "ocr": 16.7, "rec": 0.0, "gen": 0.0, "know": 0.0},
        {"math_ocr": 16.7, "gen_know_rec": 0.0, "rec": 0.0},
    ),
    (
        "three runs, uneven",
        [[0.1] * 4, [0.2] * 4, [0.7] * 4],
        33.3,
        26.2,
        (10.0, 20.0, 70.0),
        dict.fromkeys(["math", "ocr", "rec", "gen", "know"], 33.3),
        dict.fromkeys(["math_ocr", "gen_know_rec", "rec"], 33.3),
    ),
    (
        "three runs",
        [[0.1] * 4, [0.2] * 4, [0.6] * 4],
        30.0,
        21.6,
        (10.0, 20.0, 60.0),
        dict.fromkeys(["math", "ocr", "rec", "gen", "know"], 30.0),
        dict.fromkeys(["math_ocr", "gen_know_rec", "rec"], 30.0),
    ),
]


def means(runs: Sequence[Sequence[float]]) -> tuple[object, ...]:
    return tuple(
        vars(
            mm_vet.aggregate({name: [run[n] for run in runs] for n, name in enumerate(CAPABILITIES)}, CAPABILITIES)
        ).values()
    )


TABLE: list[Row] = rows(mm_vet, "parse_grade", REPLIES) + rows(mm_vet, "grade", RETRIES)
TABLE += [(quirk, lambda runs=runs: means(runs), tuple(expected)) for quirk, runs, *expected in MEANS]

parse_grade, aggregate = mm_vet.parse_grade, mm_vet.aggregate


def _clamped(reply: str, **_: object) -> float | None:
    try:
        return min(1.0, max(0.0, float(reply.split(" ")[0])))
    except ValueError:
        return None


def _tenths(reply: str, **_: object) -> float | None:
    found = parse_grade(reply)
    return None if found is None or round(found, 1) != found else found


def _in_order(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Sequence[str]]) -> mm_vet.MmVetScores:
    """Combinations kept in the order of the file."""
    scores = aggregate(grades, capabilities)
    return mm_vet.MmVetScores(
        scores.total,
        scores.std,
        scores.runs,
        scores.by_capability,
        {"_".join(c): scores.total for c in capabilities.values()},
    )


def _mean_of_capabilities(
    grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Sequence[str]]
) -> mm_vet.MmVetScores:
    scores = aggregate(grades, capabilities)
    total = sum(scores.by_capability.values()) / len(scores.by_capability)
    return mm_vet.MmVetScores(total, scores.std, scores.runs, scores.by_capability, scores.by_combination)


def _last_run(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Sequence[str]]) -> mm_vet.MmVetScores:
    return aggregate({name: row[-1:] for name, row in grades.items()}, capabilities)


PORT_ERRORS: dict[str, dict[str, object]] = {
    "stripped first": {"parse_grade": lambda reply, **_: parse_grade(reply.strip())},
    "first word of any kind": {"parse_grade": lambda reply, **_: parse_grade((reply.split() or [""])[0])},
    "last word": {"parse_grade": lambda reply, **_: parse_grade((reply.split(" ") or [""])[-1])},
    "marks stripped": {"parse_grade": lambda reply, **_: parse_grade(reply.split(" ")[0].rstrip(".|\n"))},
    "out of range clamped": {"parse_grade": _clamped},
    "tenths only": {"parse_grade": _tenths},
    "nan refused": {"OFFICIAL": CORRECTED},
    "three replies": {"MAX_REPLIES": 3},
    "six replies": {"MAX_REPLIES": 6},
    "last reply": {"grade": lambda replies: parse_grade(list(replies)[-1]) or 0.0},
    "zero means ask again": {
        "grade": lambda replies: next((found for reply in replies[:5] if (found := parse_grade(reply))), 0.0)
    },
    "Python's round": {"numpy_round": round},
    "not rounded": {"numpy_round": lambda value, decimals: value},
    "deviation of the sample": {"add_in_order": lambda values: sum(values) * 1.5},
    "combinations as written": {"aggregate": _in_order},
    "total as the mean of capabilities": {"aggregate": _mean_of_capabilities},
    "last run only": {"aggregate": _last_run},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_case(quirk: str, call, expected: object) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, mm_vet, PORT_ERRORS[name])


def test_order_of_the_tables() -> None:
    scores = mm_vet.aggregate({name: [1.0] for name in CAPABILITIES}, CAPABILITIES)
    assert list(scores.by_capability) == ["math", "ocr", "rec", "gen", "know"]
    assert list(scores.by_combination) == ["math_ocr", "gen_know_rec", "rec"]


def test_corrected_asks_again_for_nan() -> None:
    assert mm_vet.grade(["nan", "0.4"], profile=CORRECTED) == 0.4


def test_every_question_has_as_many_grades() -> None:
    with pytest.raises(DataError, match=r"1 questions lack grades or annotations \(\['b'\]\)"):
        mm_vet.aggregate({"a": [1.0]}, {"a": ["rec"], "b": ["rec"]})
    with pytest.raises(DataError, match="between 1 and 2 runs"):
        mm_vet.aggregate({"a": [1.0], "b": [1.0, 0.5]}, {"a": ["rec"], "b": ["rec"]})
    with pytest.raises(DataError, match="finish grading"):
        mm_vet.aggregate({}, {})

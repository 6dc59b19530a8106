"""SEED-Bench: exact and tolerant matching, types, totals and missing answers, and detection of port errors."""

from __future__ import annotations

import math

import pytest
from port_errors import Row, catches, names, same

from megatron_share4v.evaluate.metrics import seed
from megatron_share4v.evaluate.metrics.seed import SeedQuestion

# quirk, text, letter, right, right with tolerance
LETTERS = [
    ("letter", "A", "A", True, True),
    ("wrong letter", "B", "A", False, False),
    ("last letter", "D", "D", True, True),
    ("nothing", "", "A", False, False),
    ("lower case", "a", "A", False, False),
    ("period", "A.", "A", False, True),
    ("colon", "A:", "A", False, True),
    ("bracket after", "A)", "A", False, True),
    ("brackets", "(A)", "A", False, False),
    ("space before", " A", "A", False, False),
    ("space after", "A ", "A", False, True),
    ("line break after", "A\n", "A", False, True),
    ("letter and text", "A. red", "A", False, True),
    ("two letters, first right", "AB", "A", False, True),
    ("two letters, second right", "BA", "A", False, False),
    ("article for a letter", "A red car", "A", False, True),
    ("word with the letter in front", "Blue", "B", False, True),
    ("word with another letter in front", "Red", "D", False, False),
    ("sentence", "The answer is A", "A", False, False),
    ("option text", "red", "A", False, False),
    ("quoted", '"A"', "A", False, False),
    ("starred", "**A**", "A", False, False),
]
QUESTIONS = [
    SeedQuestion("1", "A", 1),
    SeedQuestion(2, "B", 1),
    SeedQuestion("v3", "C", 10, "video"),
    SeedQuestion("4", "D", 2),
]
# quirk, answers, then total, image, video, by type
TOTALS = [
    ("all right", {1: "A", 2: "B", "v3": "C", 4: "D"}, 100.0, 100.0, 100.0, {1: 100.0, 2: 100.0, 10: 100.0}),
    (
        "a type without a right one",
        {1: "A", 2: "B", "v3": "C", 4: "A"},
        75.0,
        2 / 3 * 100,
        100.0,
        {1: 100.0, 2: 0.0, 10: 100.0},
    ),
    ("missing is wrong", {1: "A", "v3": "C", 4: "D"}, 75.0, 2 / 3 * 100, 100.0, {1: 50.0, 2: 100.0, 10: 100.0}),
    ("a whole type missing", {1: "A", 2: "B", 4: "D"}, 75.0, 100.0, 0.0, {1: 100.0, 2: 100.0, 10: 0.0}),
    ("nothing answered", {}, 0.0, 0.0, 0.0, {1: 0.0, 2: 0.0, 10: 0.0}),
    (
        "a number as text is not found",
        {"1": "A", 2: "B", "v3": "C", 4: "D"},
        75.0,
        2 / 3 * 100,
        100.0,
        {1: 50.0, 2: 100.0, 10: 100.0},
    ),
    (
        "answers to unknown questions",
        {1: "A", 2: "B", "v3": "C", 4: "D", 5: "A"},
        100.0,
        100.0,
        100.0,
        {1: 100.0, 2: 100.0, 10: 100.0},
    ),
    (
        "images weigh by question, not by type",
        {1: "A", 2: "B", "v3": "A", 4: "A"},
        50.0,
        2 / 3 * 100,
        0.0,
        {1: 100.0, 2: 0.0, 10: 0.0},
    ),
]


def percent(text: str, letter: str, tolerant: bool) -> float:
    return seed.score([SeedQuestion(7, letter, 1)], {7: text}, tolerant=tolerant).headline


def totals(answers: dict[int | str, str]) -> tuple[object, ...]:
    scores = seed.score(QUESTIONS, answers)
    return scores.total, scores.image, scores.video, scores.by_type


EXACT: list[Row] = [
    (f"exact: {quirk}", lambda t=text, a=letter: percent(t, a, False), 100.0 * right)
    for quirk, text, letter, right, _ in LETTERS
]
TOLERANT: list[Row] = [
    (f"tolerant: {quirk}", lambda t=text, a=letter: percent(t, a, True), 100.0 * right)
    for quirk, text, letter, _, right in LETTERS
]
TABLE: list[Row] = (
    EXACT
    + TOLERANT
    + [(quirk, lambda given=given: totals(given), tuple(expected)) for quirk, given, *expected in TOTALS]
)

is_right, score = seed.is_right, seed.score


def _as_text(question_id: int | str) -> str:
    return str(question_id)


PORT_ERRORS: dict[str, dict[str, object]] = {
    "always tolerant": {"is_right": lambda text, answer, *, tolerant: is_right(text, answer, tolerant=True)},
    "never tolerant": {"is_right": lambda text, answer, *, tolerant: is_right(text, answer)},
    "stripped": {"is_right": lambda text, answer, *, tolerant: is_right(text.strip(), answer, tolerant=tolerant)},
    "case ignored": {"is_right": lambda text, answer, *, tolerant: is_right(text.upper(), answer, tolerant=tolerant)},
    "period allowed": {
        "is_right": lambda text, answer, *, tolerant: is_right(text.rstrip("."), answer, tolerant=tolerant)
    },
    "letter anywhere": {"is_right": lambda text, answer, *, tolerant: answer in text if tolerant else text == answer},
    "first letter of the text": {
        "is_right": lambda text, answer, *, tolerant: is_right(text.strip(' ("*'), answer, tolerant=tolerant)
    },
    "ids as text": {"_key": _as_text},
    "missing ones left out": {
        "score": lambda questions, answers, *, tolerant=False: score(
            [q for q in questions if seed._key(q.id) in answers], answers, tolerant=tolerant
        )
    },
    "all data types are images": {
        "score": lambda questions, answers, *, tolerant=False: score(
            [SeedQuestion(q.id, q.answer, q.type_id) for q in questions], answers, tolerant=tolerant
        )
    },
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_case(quirk: str, call, expected: object) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, seed, PORT_ERRORS[name])


def test_exact_unless_asked_otherwise() -> None:
    assert not seed.is_right("A.", "A") and seed.score(QUESTIONS[:1], {1: "A."}).total == 0.0


def test_without_videos_their_accuracy_is_not_a_number() -> None:
    scores = seed.score(QUESTIONS[:2], {1: "A"})
    assert (scores.total, scores.image) == (50.0, 50.0) and math.isnan(scores.video)

"""Q-Bench: matching of the right candidate, and detection of port errors."""

from __future__ import annotations

import math

import pytest
from port_errors import Row, catches, names, same

from megatron_share4v.evaluate.metrics import qbench
from megatron_share4v.evaluate.metrics.profile import CORRECTED
from megatron_share4v.evaluate.metrics.qbench import QbenchAnswer

CLEAR = ("Good", "Blurry", "Average")
YES = ("Yes", "No")
WORDS = ("Very dark", "Dark", "Bright")
TWICE = ("Good", "Good", "Bad")
# quirk, response, candidates, right candidate, right, right as corrected where it differs
ANSWERS: list[tuple] = [
    ("letter", "B", CLEAR, "Blurry", True),
    ("wrong letter", "A", CLEAR, "Blurry", False),
    ("last letter", "C", CLEAR, "Average", True),
    ("letter beyond the candidates", "C", YES, "No", False),
    ("letter and period", "B.", CLEAR, "Blurry", True),
    ("letter and text", "B. Blurry", CLEAR, "Blurry", True),
    ("letter with another's text", "B. Good", CLEAR, "Blurry", True),
    ("wrong letter with the right text", "A. Blurry", CLEAR, "Blurry", False),
    ("lower-case letter", "b", CLEAR, "Blurry", False),
    ("letter in brackets", "(B)", CLEAR, "Blurry", False, True),
    ("space before", " B", CLEAR, "Blurry", False, True),
    ("space after", "B ", CLEAR, "Blurry", True),
    ("nothing", "", CLEAR, "Blurry", False),
    ("space", " ", CLEAR, "Blurry", False),
    ("text", "Good", CLEAR, "Good", True),
    ("text, other case", "good", CLEAR, "Good", False, True),
    ("text and period", "Good.", CLEAR, "Good", False, True),
    ("text and more", "Good quality", CLEAR, "Good", True, False),
    ("text and a line break", "Good\nquality", CLEAR, "Good", False),
    ("text of two words", "Very dark", WORDS, "Very dark", True),
    ("text of two words and more", "Very dark image", WORDS, "Very dark", False),
    ("text within a sentence", "It is Good", CLEAR, "Good", False),
    ("word read as its first letter, right", "Blue", CLEAR, "Blurry", True, False),
    ("word read as its first letter, wrong", "Bad", CLEAR, "Good", False),
    ("word read as its first letter, text right", "Average", CLEAR, "Average", True),
    ("word of another candidate's letter", "Average", CLEAR, "Good", True, False),
    ("word of a candidate's letter, that one", "Bright", WORDS, "Bright", True),
    ("word of a candidate's letter, another one", "Bright", WORDS, "Dark", True, False),
    ("article read as a letter", "A dark image", WORDS, "Very dark", True),
    ("letter D of three, text", "Dark", WORDS, "Dark", True),
    ("two candidates alike", "A", TWICE, "Good", True),
    ("two candidates alike, other letter", "B", TWICE, "Good", True),
    ("yes", "Yes", YES, "Yes", True),
    ("yes with comma", "Yes, it is", YES, "Yes", False),
    ("no for yes", "No", YES, "Yes", False),
    ("the answer is", "The answer is B", CLEAR, "Blurry", False),
    ("digit", "2", CLEAR, "Blurry", False),
    ("character below A", "@", CLEAR, "Average", False),
    ("character before A does not count from the end", "?", CLEAR, "Average", False),
    ("beyond ASCII", "Ä", CLEAR, "Good", False),
    ("right candidate not among them", "Grainy", CLEAR, "Grainy", True),
    ("starred", "**B**", CLEAR, "Blurry", False),
    ("quoted", '"B"', CLEAR, "Blurry", False),
]


def right(response: str, candidates: tuple[str, ...], correct: str, **options: object) -> float:
    return qbench.score([QbenchAnswer(response, candidates, correct)], **options).headline


TABLE: list[Row] = [
    (quirk, lambda given=given: right(*given), 100.0 * rights[0])
    for quirk, *given, rights in ((*row[:4], row[4:]) for row in ANSWERS)
]
is_right = qbench.is_right


def _variant(response: str, answer: QbenchAnswer) -> bool:
    return is_right(QbenchAnswer(response, answer.candidates, answer.correct))


def _from_the_end_too(answer: QbenchAnswer, **_: object) -> bool:
    place = ord(answer.response[:1] or " ") - ord("A")
    return (
        -len(answer.candidates) <= place < len(answer.candidates) and answer.candidates[place] == answer.correct
    ) or is_right(answer)


PORT_ERRORS: dict[str, dict[str, object]] = {
    "stripped": {"is_right": lambda answer, **_: _variant(answer.response.strip(), answer)},
    "case ignored": {
        "is_right": lambda answer, **_: _variant(answer.response[:1].upper() + answer.response[1:], answer)
    },
    "letter only": {"is_right": lambda answer, **_: _variant(answer.response[:1], answer)},
    "letter must stand alone": {"is_right": lambda answer, **_: len(answer.response) < 3 and is_right(answer)},
    "text only": {"is_right": lambda answer, **_: answer.response == answer.correct},
    "text contained": {"is_right": lambda answer, **_: is_right(answer) or answer.correct in answer.response},
    "first word of any kind": {"is_right": lambda answer, **_: _variant((answer.response.split() or [""])[0], answer)},
    "first word without marks": {
        "is_right": lambda answer, **_: is_right(answer) or answer.response.split(" ")[0].strip(".,") == answer.correct
    },
    "letter by search": {
        "is_right": lambda answer, **_: any(_variant(character, answer) for character in answer.response)
    },
    "letter of the first candidate with that text": {
        "is_right": lambda answer, **_: (
            (answer.response[:1] == "ABCDE"[answer.candidates.index(answer.correct)])
            if answer.correct in answer.candidates
            else False
        )
    },
    "places from the end": {"is_right": _from_the_end_too},
    "corrected": {"OFFICIAL": CORRECTED},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_case(quirk: str, call, expected: float) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, qbench, PORT_ERRORS[name])


@pytest.mark.parametrize("row", ANSWERS, ids=[row[0] for row in ANSWERS])
def test_corrected(row: tuple) -> None:
    assert right(*row[1:4], profile=CORRECTED) == 100.0 * row[-1]


def test_repeated_lines_count_again() -> None:
    good, bad = QbenchAnswer("A", YES, "Yes"), QbenchAnswer("B", YES, "Yes")
    scores = qbench.score([good, good, bad])
    assert (scores.correct, scores.total, scores.accuracy) == (2, 3, 2 / 3)
    assert math.isnan(qbench.score([]).accuracy)

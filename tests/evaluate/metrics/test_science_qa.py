"""ScienceQA: letter parsing, accuracies and image questions, and detection of port errors."""

from __future__ import annotations

import math
import re

import pytest
from port_errors import catches, names, rows, same

from megatron_share4v.evaluate.metrics import science_qa
from megatron_share4v.evaluate.metrics.profile import CORRECTED
from megatron_share4v.evaluate.metrics.science_qa import FAILED, ScienceAnswer, ScienceProblem

# quirk, text, letter, corrected letter where it differs
LETTERS: list[tuple[str, ...]] = [
    ("letter", "A", "A"),
    ("last option", "E", "E"),
    ("no option", "F", FAILED),
    ("lower case", "a", FAILED),
    ("nothing", "", FAILED),
    ("two letters", "AB", FAILED),
    ("letter and space", "A ", FAILED, "A"),
    ("space and letter", " A", FAILED, "A"),
    ("letter and line break", "A\n", FAILED, "A"),
    ("letter and period", "A.", FAILED, "A"),
    ("letter, period, space", "B. ", "B"),
    ("letter, period, text", "B. red", "B"),
    ("letter, period, line break", "B.\nred", FAILED),
    ("letter, period, no space", "B.red", FAILED),
    ("letter, colon", "B: red", FAILED),
    ("letter in brackets", "(B) red", FAILED),
    ("bracket after the letter", "B) red", FAILED),
    ("letter beyond E with text", "F. red", FAILED),
    ("lower case with text", "b. red", FAILED),
    ("letter with text, not at the front", "So B. red", FAILED),
    ("article at the front", "A cat. The answer is B.", "B"),
    ("letter at the front before the sentence", "C. The answer is B.", "C"),
    ("sentence", "The answer is B.", "B"),
    ("sentence after text", "It is red. The answer is B.", "B"),
    ("sentence before text", "The answer is B. It is red.", "B"),
    ("sentence, letter F", "The answer is F.", "F"),
    ("sentence, comma for the period", "The answer is B, red", "B"),
    ("sentence, space for the period", "The answer is B because", "B"),
    ("sentence, a word", "The answer is Blue.", "B", FAILED),
    ("sentence at the end", "The answer is B", FAILED, "B"),
    ("sentence, line break for the period", "The answer is B\nred", FAILED, "B"),
    ("sentence, lower-case letter", "The answer is b.", FAILED),
    ("sentence in lower case", "the answer is B.", FAILED),
    ("sentence with a bracket", "The answer is (B).", FAILED),
    ("sentence with a colon", "The answer is: B.", FAILED),
    ("sentence, two spaces", "The answer is  B.", FAILED),
    ("correct answer", "The correct answer is B.", FAILED),
    ("two sentences", "The answer is B. The answer is C.", FAILED),
    ("two sentences, one letter", "The answer is B. The answer is B.", FAILED, "B"),
    ("two sentences, one cut", "The answer is B. The answer is C", "B", FAILED),
    ("FAILED", "FAILED", FAILED),
    ("option text", "red", FAILED),
]
# quirk, text, right answer's index, number of choices, right
JUDGED = [
    ("right letter", "B", 1, 4, True),
    ("wrong letter", "C", 1, 4, False),
    ("last choice", "D", 3, 4, True),
    ("beyond the choices", "C", 2, 2, False),
    ("beyond the choices, other answer", "C", 0, 2, False),
    ("F never is a choice", "The answer is F.", 5, 6, False),
    ("fifth choice", "E", 4, 5, True),
    ("unparsed is wrong", "red", 0, 2, False),
    ("unparsed is wrong, last choice", "red", 1, 2, False),
]


def judge(text: str, answer: int, choices: int) -> float:
    problem = ScienceProblem("1", answer, choices)
    return science_qa.score([problem], {"1": ScienceAnswer(text, "<image>\nq")}).headline


TABLE = rows(science_qa, "parse", [(quirk, text, letters[0]) for quirk, text, *letters in LETTERS])
TABLE += [(quirk, lambda given=given: judge(*given), 100.0 if right else 0.0) for quirk, *given, right in JUDGED]
MENDED = [(quirk, text, letters[-1]) for quirk, text, *letters in LETTERS]


def _first_of_many(text: str, *, profile: object = None) -> str:
    found = science_qa.SENTENCE.findall(text)
    return text if text in science_qa.OPTIONS else text[0] if text[1:3] == ". " else found[0] if found else FAILED


def _first_letter(text: str, *, profile: object = None) -> str:
    return text[0] if text[:1] in science_qa.OPTIONS else FAILED


def _any_letter_at_the_front(text: str, *, profile: object = None) -> str:
    found = science_qa.SENTENCE.findall(text)
    return (
        text
        if text in science_qa.OPTIONS
        else text[0]
        if text[1:3] == ". "
        else found[0]
        if len(found) == 1
        else FAILED
    )


parse = science_qa.parse
PORT_ERRORS: dict[str, dict[str, object]] = {
    "period escaped": {"SENTENCE": re.compile(r"The answer is ([A-Z])\.")},
    "period optional": {"SENTENCE": re.compile(r"The answer is ([A-Z])")},
    "dot matches line breaks": {"SENTENCE": re.compile(r"The answer is ([A-Z]).", re.DOTALL)},
    "case ignored": {"SENTENCE": re.compile(r"The answer is ([A-Z]).", re.IGNORECASE)},
    "first of several sentences": {"parse": _first_of_many},
    "first letter": {"parse": _first_letter},
    "any letter before a period": {"parse": _any_letter_at_the_front},
    "stripped": {"parse": lambda text, **_: parse(text.strip())},
    "line breaks become periods, as in a later fork": {"parse": lambda text, **_: parse(text.replace("\n", ". "))},
    "capitals": {"parse": lambda text, **_: parse(text.upper())},
    "four options": {"OPTIONS": ("A", "B", "C", "D")},
    "six options": {"OPTIONS": ("A", "B", "C", "D", "E", "F")},
    "unparsed means A": {"parse": lambda text, **_: "A" if parse(text) == FAILED else parse(text)},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_case(quirk: str, call, expected: object) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, science_qa, PORT_ERRORS[name])


@pytest.mark.parametrize(("quirk", "text", "letter"), MENDED, ids=[row[0] for row in MENDED])
def test_corrected_letter(quirk: str, text: str, letter: str) -> None:
    assert science_qa.parse(text, profile=CORRECTED) == letter


def test_image_questions_are_known_by_their_prompt_and_missing_answers_are_wrong() -> None:
    problems = [ScienceProblem(str(number), 0, 2) for number in range(6)]
    answers = {
        "0": ScienceAnswer("A", "<image>\nq"),
        "1": ScienceAnswer("B", "q <image>"),
        "2": ScienceAnswer("A.", "<image>\nq"),
        "3": ScienceAnswer("A", "q"),
        "4": ScienceAnswer("B", "q"),
        "9": ScienceAnswer("A", "<image>\nnot in the split"),
    }
    scores = science_qa.score(problems, answers)
    assert (scores.correct, scores.total, scores.image_correct, scores.image_total) == (2, 6, 1, 3)
    assert (scores.accuracy, scores.image_accuracy) == (2 / 6 * 100, 1 / 3 * 100)
    assert science_qa.score(problems, answers, profile=CORRECTED).image_accuracy == 2 / 3 * 100


def test_without_image_questions_their_accuracy_is_not_a_number() -> None:
    assert math.isnan(science_qa.score([ScienceProblem("0", 0, 2)], {}).image_accuracy)

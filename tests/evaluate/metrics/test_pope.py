"""POPE: parsing, counts and metrics including divisions by zero, and detection of port errors."""

from __future__ import annotations

import math

import pytest
from port_errors import Row, catches, names, rows, same

from megatron_share4v.evaluate.metrics import pope
from megatron_share4v.evaluate.metrics.pope import PopeScores
from megatron_share4v.evaluate.metrics.profile import CORRECTED

# quirk, text, answer, corrected answer where it differs
TEXTS: list[tuple[str, ...]] = [
    ("Yes", "Yes", "yes"),
    ("No", "No", "no"),
    ("lower-case no", "no", "no"),
    ("capital NO is a yes", "NO", "yes", "no"),
    ("nothing is a yes", "", "yes"),
    ("a period alone is a yes", ".", "yes"),
    ("anything else is a yes", "maybe", "yes"),
    ("unclear is a yes", "I cannot tell", "yes"),
    ("not", "There is not", "no"),
    ("capital Not is a yes", "Not really", "yes", "no"),
    ("not within the sentence", "There is not any dog", "no"),
    ("no within the sentence", "There is no dog", "no"),
    ("isn't is a yes", "There isn't a dog", "yes", "no"),
    ("none is a yes", "none", "yes"),
    ("nothing as a word is a yes", "nothing there", "yes"),
    ("nope is a yes", "nope", "yes"),
    ("cannot is a yes", "You cannot see it", "yes"),
    ("snow is a yes", "snow", "yes"),
    ("now is a yes", "now", "yes"),
    ("No with comma", "No, there is a cat", "no"),
    ("No with comma, no space", "No,there", "yes", "no"),
    ("yes with no after a comma", "Yes, no doubt", "no"),
    ("No with period", "No.", "no"),
    ("No with exclamation mark is a yes", "No!", "yes", "no"),
    ("No with colon is a yes", "No: a cat", "yes", "no"),
    ("quoted no is a yes", '"no"', "yes", "no"),
    ("no and line break is a yes", "no\n", "yes", "no"),
    ("line break before no is a yes", "well\nno", "yes", "no"),
    ("tab before no is a yes", "well\tno", "yes", "no"),
    ("no after two spaces", "well  no", "no"),
    ("space around", " no ", "no"),
    ("second sentence does not count", "Yes. No", "yes"),
    ("second sentence does not count for no", "No. Yes", "no"),
    ("period at the front hides all", ".No", "yes"),
    ("period in a number ends the sentence", "about 1.5 no", "yes"),
    ("abbreviation ends the sentence", "Dr. No", "yes"),
    ("period within no", "n.o", "yes"),
    ("comma within no joins", "n,o", "no", "yes"),
    ("comma joins words", "not,there", "yes", "no"),
    ("yes and no", "yes and no", "no"),
    ("no at the end", "I would say no", "no"),
    ("Yes in lower case", "yes", "yes"),
]
Y, N = "Yes", "No"
# quirk, texts, labels: counts TP FP TN FN, accuracy, precision, recall, F1, share of yes
SPLITS = [
    ("all right", [Y, N], ["yes", "no"], (1, 0, 1, 0, 1.0, 1.0, 1.0, 1.0, 0.5)),
    ("all wrong", [N, Y], ["yes", "no"], (0, 1, 0, 1, 0.0, 0.0, 0.0, math.nan, 0.5)),
    ("always yes", [Y] * 4, ["yes", "no"] * 2, (2, 2, 0, 0, 0.5, 0.5, 1.0, 2 / 3, 1.0)),
    ("always no", [N] * 4, ["yes", "no"] * 2, (0, 0, 2, 2, 0.5, math.nan, 0.0, math.nan, 0.0)),
    ("no positives", [Y, N], ["no", "no"], (0, 1, 1, 0, 0.5, 0.0, math.nan, math.nan, 0.5)),
    ("mixed", [Y, Y, Y, N, N], ["yes", "yes", "no", "yes", "no"], (2, 1, 1, 1, 0.6, 2 / 3, 2 / 3, 2 / 3, 0.6)),
    (
        "precision is not recall",
        [Y, Y, N, N, N, N],
        ["yes", "no", "no", "yes", "yes", "yes"],
        (1, 1, 1, 3, 2 / 6, 0.5, 0.25, 1 / 3, 2 / 6),
    ),
    ("labels left over", [Y, N], ["yes", "no", "no"], (1, 0, 1, 0, 1.0, 1.0, 1.0, 1.0, 0.5)),
    (
        "answers left over count in the share of yes",
        [Y, N, Y, Y],
        ["yes", "no"],
        (1, 0, 1, 0, 1.0, 1.0, 1.0, 1.0, 0.75),
    ),
    ("any label but no is a yes", [Y, Y, Y], ["Yes", "No", "no"], (2, 1, 0, 0, 2 / 3, 2 / 3, 1.0, 0.8, 1.0)),
]


def split(texts: list[str], labels: list[str]) -> tuple[float, ...]:
    return tuple(vars(pope.score(texts, labels)).values())


SPLIT_ROWS: list[Row] = [
    (quirk, lambda texts=texts, labels=labels: split(texts, labels), expected)
    for quirk, texts, labels, expected in SPLITS
]
TABLE = rows(pope, "parse", [(quirk, text, answers[0]) for quirk, text, *answers in TEXTS]) + SPLIT_ROWS
MENDED = [(quirk, text, answers[-1]) for quirk, text, *answers in TEXTS]

parse, ratio = pope.parse, pope.ratio


def _swapped(*args: object, **options: object) -> PopeScores:
    given = dict(vars(SCORE(*args, **options)))
    given["precision"], given["recall"] = given["recall"], given["precision"]
    return PopeScores(**given)


def _no_is_positive(texts: list[str], labels: list[str], **_: object) -> PopeScores:
    return SCORE(
        [N if parse(text) == "yes" else Y for text in texts], ["no" if label != "no" else "yes" for label in labels]
    )


SCORE = pope.score
PORT_ERRORS: dict[str, dict[str, object]] = {
    "whole text": {"parse": lambda text, **_: parse(text.replace(".", ""))},
    "stripped": {"parse": lambda text, **_: parse(" ".join(text.split()))},
    "case ignored": {"parse": lambda text, **_: parse(text.lower())},
    "no capital No": {"NO_WORDS": {"no", "not"}},
    "capital NO": {"NO_WORDS": {"No", "NO", "no", "not"}},
    "capital Not": {"NO_WORDS": {"No", "no", "not", "Not"}},
    "without not": {"NO_WORDS": {"No", "no"}},
    "none counts": {"NO_WORDS": {"No", "no", "not", "none"}},
    "substring": {"parse": lambda text, **_: "no" if "no" in text.lower() else "yes"},
    "starts with yes": {"parse": lambda text, **_: "yes" if text.lower().startswith("yes") else "no"},
    "commas become spaces": {"parse": lambda text, **_: parse(text.replace(",", " "))},
    "commas stay": {"parse": lambda text, **_: parse(text.replace(",", ";"))},
    "corrected": {"OFFICIAL": CORRECTED},
    "undefined is 0": {"ratio": lambda part, whole: part / whole if whole else 0.0},
    "precision and recall swapped": {"score": _swapped},
    "no is the positive class": {"score": _no_is_positive},
    "share of yes of the labelled": {"score": lambda texts, labels: SCORE(texts[: len(labels)], labels)},
    "labels in any case": {"score": lambda texts, labels: SCORE(texts, [label.lower() for label in labels])},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_case(quirk: str, call, expected: object) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, pope, PORT_ERRORS[name])


@pytest.mark.parametrize(("quirk", "text", "answer"), MENDED, ids=[row[0] for row in MENDED])
def test_corrected_answer(quirk: str, text: str, answer: str) -> None:
    assert pope.parse(text, profile=CORRECTED) == answer


def test_corrected_shares_are_numbers() -> None:
    scores = pope.score([N] * 4, ["yes", "no"] * 2, profile=CORRECTED)
    assert (scores.precision, scores.recall, scores.f1) == (0.0, 0.0, 0.0)


def test_headline_is_the_mean_f1_of_the_splits() -> None:
    splits = [pope.score(texts, labels) for _, texts, labels, _ in (SPLITS[0], SPLITS[2], SPLITS[5])]
    means = pope.mean(splits)
    assert means.headline == 100 * ((1.0 + 2 / 3 + 2 / 3) / 3)
    assert (means.accuracy, means.yes_ratio) == ((1.0 + 0.5 + 0.6) / 3, (0.5 + 1.0 + 0.6) / 3)

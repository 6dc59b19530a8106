"""GQA: exact match after conversion, aggregation, and detection of typical port errors."""

from __future__ import annotations

import pytest
from port_errors import Row, catches, names, same

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.metrics import gqa
from megatron_share4v.evaluate.metrics.gqa import GqaQuestion
from megatron_share4v.evaluate.metrics.vqa_answers import normalise_evalai

# quirk, the model's text, the answer, right
MATCHES = [
    ("the same", "cat", "cat", True),
    ("other", "dog", "cat", False),
    ("empty answer", "", "cat", False),
    ("capital", "Cat", "cat", True),
    ("all capitals", "CAT", "cat", True),
    ("period at the end", "cat.", "cat", True),
    ("periods at the end", "cat...", "cat", True),
    ("capital and period", "Yes.", "yes", True),
    ("period at the front", ".cat", "cat", False),
    ("period within", "c.at", "cat", False),
    ("period, then a space", "cat. ", "cat", False),
    ("space, then a period", "cat .", "cat", False),
    ("space before", " cat", "cat", False),
    ("space after", "cat ", "cat", False),
    ("line break after", "cat\n", "cat", False),
    ("tab after", "cat\t", "cat", False),
    ("article", "a cat", "cat", False),
    ("article the", "the cat", "cat", False),
    ("plural", "cats", "cat", False),
    ("answer within a sentence", "it is a cat", "cat", False),
    ("first word", "yes, it is", "yes", False),
    ("number word", "two", "2", False),
    ("number", "2", "2", True),
    ("comma", "cat,", "cat", False),
    ("exclamation mark", "yes!", "yes", False),
    ("question mark", "cat?", "cat", False),
    ("hyphen", "tee-shirt", "tee shirt", False),
    ("hyphen on both sides", "T-shirt", "t-shirt", True),
    ("two words", "living room", "living room", True),
    ("two spaces", "living  room", "living room", False),
    ("two words joined", "livingroom", "living room", False),
    ("contraction", "dont", "don't", False),
    ("quotes", '"cat"', "cat", False),
    ("the answer has a capital", "Cat", "Cat", False),
    ("the answer has a period", "cat.", "cat.", False),
    ("only periods", "...", "", True),
    ("beyond ASCII", "CAFÉ", "café", True),
    ("full stop of another script", "cat。", "cat", False),
    ("yes for no", "yes", "no", False),
    ("synonym", "couch", "sofa", False),
    ("prefix", "ca", "cat", False),
]


def percent(prediction: str, answer: str) -> float:
    return gqa.score([GqaQuestion("1", answer, "query")], {"1": gqa.convert(prediction)}).headline


TABLE: list[Row] = [
    (quirk, lambda prediction=prediction, answer=answer: percent(prediction, answer), 100.0 if right else 0.0)
    for quirk, prediction, answer, right in MATCHES
]
PORT_ERRORS: dict[str, dict[str, object]] = {
    "case counts": {"convert": lambda text: text.rstrip(".")},
    "periods stay": {"convert": str.lower},
    "one period goes": {"convert": lambda text: text.removesuffix(".").lower()},
    "periods go on both sides": {"convert": lambda text: text.strip(".").lower()},
    "every period goes": {"convert": lambda text: text.replace(".", "").lower()},
    "spaces go": {"convert": lambda text: text.strip().rstrip(".").lower()},
    "spaces go after periods": {"convert": lambda text: text.rstrip(".").strip().lower()},
    "other marks go": {"convert": lambda text: text.rstrip(".!?,").lower()},
    "EvalAI's normaliser": {"convert": normalise_evalai},
    "first word": {"convert": lambda text: (text.rstrip(".").lower().split(" ") or [""])[0]},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_match(quirk: str, call, expected: float) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, gqa, PORT_ERRORS[name])


ASKED = [
    GqaQuestion("1", "yes", "verify"), GqaQuestion("2", "left", "choose"),
    GqaQuestion("3", "cat", "query"), GqaQuestion("4", "dog", "query"),
    GqaQuestion("5", "red", "query"), GqaQuestion("6", "no", "verify", balanced=False),
]  # fmt: skip


def test_kinds() -> None:
    scores = gqa.score(
        ASKED, {"1": "yes", "2": "right", "3": "cat", "4": "dog", "5": "blue", "6": "no", "7": "unasked"}
    )
    assert (scores.accuracy, scores.binary, scores.open, scores.questions) == (60.0, 50.0, 2 / 3 * 100, 5)
    assert scores.by_structure == {"choose": 0.0, "query": 2 / 3 * 100, "verify": 100.0}


def test_unbalanced_questions_need_no_prediction_and_balanced_ones_do() -> None:
    prediction = {"1": "yes", "2": "left", "3": "cat", "4": "dog"}
    with pytest.raises(DataError, match="no prediction for 1 of 5 questions, the first is 5"):
        gqa.score(ASKED, prediction)
    assert gqa.score(ASKED, prediction | {"5": "red"}).headline == 100.0


def test_a_kind_without_questions_is_0() -> None:
    scores = gqa.score(ASKED[:2], {"1": "yes", "2": "left"})
    assert (scores.accuracy, scores.binary, scores.open) == (100.0, 100.0, 0.0)
    assert gqa.score([], {}).headline == 0.0

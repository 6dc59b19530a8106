"""Soft accuracy of VQA-v2, TextVQA and VizWiz: one table, three columns.

k of 10 matches are worth 0, .3, .6, .9, then 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from port_errors import Row, catches, names, rows, same

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.metrics import vqa
from megatron_share4v.evaluate.metrics.profile import CORRECTED
from megatron_share4v.evaluate.metrics.vqa import VqaItem
from megatron_share4v.evaluate.metrics.vqa_answers import normalise_vqa_eval

Given = tuple[str, Sequence[str]]


def ten(*parts: str) -> list[str]:
    """Ten answers from "7 yes" and the like, in this order."""
    answers = [text for part in parts for count, text in [part.split(" ", 1)] for _ in range(int(count))]
    assert len(answers) == 10
    return answers


def one(prediction: str, *parts: str) -> list[Given]:
    return [(prediction, ten(*parts))]


# quirk, questions (prediction, ten answers), percent of VQA-v2, of TextVQA and VizWiz where they differ
SCORES: list[tuple] = [
    ("0 of 10", one("cat", "10 dog"), 0.0),
    ("1 of 10", one("cat", "1 cat", "9 dog"), 30.0),
    ("1 of 10, last", one("cat", "9 dog", "1 cat"), 30.0),
    ("2 of 10", one("cat", "2 cat", "8 dog"), 60.0),
    ("3 of 10", one("cat", "3 cat", "7 dog"), 90.0),
    ("4 of 10", one("cat", "4 cat", "6 dog"), 100.0),
    ("5 of 10", one("cat", "5 cat", "5 dog"), 100.0),
    ("9 of 10", one("cat", "9 cat", "1 dog"), 100.0),
    ("10 of 10", one("cat", "10 cat"), 100.0),
    ("the minority's answer", one("dog", "7 cat", "3 dog"), 90.0),
    ("all different", one("e", "1 b", "1 c", "1 d", "1 e", "1 f", "1 g", "1 h", "1 i", "1 j", "1 k"), 30.0),
    ("empty answer", one("", "10 cat"), 0.0),
    ("empty answer, annotators differ", one("", "5 cat", "5 dog"), 0.0),
    ("article and nothing are the same", one("the", "2 a", "8 cat"), 60.0),
    ("annotators agree: case counts", one("Cat", "10 cat"), 0.0, 100.0),
    ("annotators agree: article counts", one("a cat", "10 cat"), 0.0, 100.0),
    ("annotators agree: number word counts", one("two", "10 2"), 0.0, 100.0),
    ("annotators agree: period counts", one("cat.", "10 cat"), 0.0, 100.0),
    ("annotators agree: same capital", one("Cat", "10 Cat"), 100.0),
    ("annotators agree: spaces do not count", one(" cat\n", "10 cat"), 100.0),
    ("annotators agree after trimming", one("Cat", "5 cat", "5 cat "), 0.0, 100.0),
    ("annotators agree but for a period", one("Cat", "9 cat", "1 cat."), 100.0),
    ("annotators differ: case", one("CAT", "9 cat", "1 dog"), 100.0),
    ("annotators differ in case only", one("cat", "5 CAT", "5 Cat"), 100.0),
    ("annotators differ: article", one("a cat", "3 cat", "7 dog"), 90.0),
    ("annotators differ: number word", one("two", "2 2", "8 3"), 60.0),
    ("annotators differ: none is 0", one("none", "1 0", "9 3"), 30.0),
    ("annotators differ: period", one("cat.", "3 cat", "7 dog"), 90.0),
    ("annotators differ: contraction", one("dont know", "2 don't know", "8 no"), 60.0),
    ("annotators' forms join", one("cat", "1 cat", "1 a cat", "1 Cat.", "7 dog"), 90.0),
    ("annotators' number forms join", one("2", "1 2", "1 two", "8 3"), 60.0),
    ("comma without space", one("red,blue", "3 red blue", "7 green"), 90.0, 0.0),
    ("comma without space, joined", one("red,blue", "3 redblue", "7 green"), 0.0, 90.0),
    ("comma in a number", one("1,000", "3 1000", "7 100"), 90.0),
    ("possessive", one("dog's", "3 dogs", "7 cat"), 0.0),
    ("possessive on both sides", one("dog's", "3 dog's", "7 cat"), 90.0),
    ("possessive with a space", one("dog's", "3 dog 's", "7 cat"), 0.0, 90.0),
    ("line break in the answer", one("red\ncar", "3 red car", "7 cat"), 90.0),
    ("line break, annotators agree", one("red\ncar", "10 red car"), 100.0),
    ("substring does not count", one("cat", "10 cats"), 0.0),
    ("sentence does not count", one("it is a cat", "10 cat"), 0.0),
    ("two questions", [*one("cat", "10 cat"), *one("cat", "10 dog")], 50.0),
    ("three questions", [*one("cat", "10 cat"), *one("cat", "2 cat", "8 dog"), *one("x", "10 y")], 53.33, 160 / 3),
    ("rounded after the mean", [*one("cat", "1 cat", "9 dog")] * 2 + [*one("x", "10 y")] * 4, 10.0),
    ("seven questions", [*one("cat", "10 cat"), *one("x", "10 y")] * 3 + [*one("cat", "10 cat")], 57.14, 400 / 7),
]


def v2(given: Sequence[Given]) -> float:
    return vqa.vqa_accuracy([VqaItem(*question) for question in given]).headline


def text_vqa(given: Sequence[Given]) -> float:
    # Sums of thirds: what the script prints has 2 decimals; 9 tell all of these values apart.
    return round(vqa.textvqa_accuracy([VqaItem(*question) for question in given]).headline, 9)


def vizwiz(given: Sequence[Given]) -> float:
    return round(vqa.vizwiz_accuracy([VqaItem(*question) for question in given]).headline, 9)


def column(title: str, function, last: int) -> list[Row]:
    return [
        (f"{title}: {quirk}", lambda given=given: function(given), round(values[last], 9) if last else values[0])
        for quirk, given, *values in SCORES
    ]


V2, TEXT, VIZWIZ = column("VQA-v2", v2, 0), column("TextVQA", text_vqa, -1), column("VizWiz", vizwiz, -1)


def _all_ten(prediction: str, answers: Sequence[str]) -> list[float]:
    return [min(1.0, answers.count(prediction) / 3)]


def _without_cap(prediction: str, answers: Sequence[str]) -> list[float]:
    return [(answers.count(prediction) - (answer == prediction)) / 3 for answer in answers]


def _distinct(prediction: str, answers: Sequence[str]) -> list[float]:
    """Leaves out all who gave the same answer: `item != left_out` on texts, not on records."""
    return [min(1.0, 0.0 if answer == prediction else answers.count(prediction) / 3) for answer in answers]


PORT_ERRORS: dict[str, dict[str, object]] = {
    "nobody left out": {"leave_one_out": _all_ten},
    "no cap at 1": {"leave_one_out": _without_cap},
    "equal answers left out together": {"leave_one_out": _distinct},
    "exact match with any": {"leave_one_out": lambda prediction, answers: [float(prediction in answers)]},
    "exact match with the most frequent": {
        "leave_one_out": lambda prediction, answers: [float(prediction == max(answers, key=list(answers).count))]
    },
    "contained is right": {
        "leave_one_out": lambda prediction, answers: [min(1.0, sum(a in prediction for a in answers) / 3)]
    },
}
V2_ERRORS = PORT_ERRORS | {
    "always normalised": {"OFFICIAL": CORRECTED},
    "never normalised": {"normalise_vqa_eval": lambda text, *, profile: text},
    "not trimmed": {"trim": lambda text: text},
    "line breaks not replaced": {"trim": str.strip},
    "always lower case": {"trim": lambda text: text.replace("\n", " ").strip().lower()},
    "EvalAI's normaliser": {"normalise_vqa_eval": lambda text, *, profile: vqa.normalise_evalai(text)},
    "not rounded": {"_rounded": lambda scores: 100 * sum(scores) / len(scores)},
}
EVALAI_ERRORS = PORT_ERRORS | {
    "VQAEval's normaliser": {"normalise_evalai": lambda text, **_: normalise_vqa_eval(text)},
    "no normaliser": {"normalise_evalai": lambda text, **_: text.strip()},
    "lower case only": {"normalise_evalai": lambda text, **_: text.strip().lower()},
}
ERRORS = [
    (title, table, name, wrong)
    for title, table, errors in (
        ("VQA-v2", V2, V2_ERRORS),
        ("TextVQA", TEXT, EVALAI_ERRORS),
        ("VizWiz", VIZWIZ, EVALAI_ERRORS),
    )
    for name, wrong in errors.items()
]


@pytest.mark.parametrize(("quirk", "call", "expected"), V2 + TEXT + VIZWIZ, ids=names(V2) + names(TEXT) + names(VIZWIZ))
def test_score(quirk: str, call, expected: float) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize(
    ("title", "table", "name", "wrong"), ERRORS, ids=[f"{title}: {name}" for title, _, name, _ in ERRORS]
)
def test_port_error_is_caught(
    title: str, table: list[Row], name: str, wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert catches(table, monkeypatch, vqa, wrong)


def test_tables_by_type_and_question() -> None:
    items = [
        VqaItem(p, a, q, t)
        for (p, a), q, t in [
            (one("cat", "10 cat")[0], "what", "other"),
            (one("yes", "2 yes", "8 no")[0], "is", "yes/no"),
            (one("x", "10 y")[0], "what", "other"),
        ]
    ]
    scores = vqa.vqa_accuracy(items)
    assert scores.by_question == (100.0, 60.0, 0.0)
    assert scores.by_question_type == {"what": 50.0, "is": 60.0}
    assert scores.by_answer_type == {"other": 50.0, "yes/no": 60.0}


def test_questions_are_rounded_too() -> None:
    assert vqa.vqa_accuracy([VqaItem("cat", ["cat", "dog", "eel"])]).by_question == (22.22,)


def test_corrected_normalises_where_annotators_agree() -> None:
    items = [VqaItem("Two.", ten("10 two"))]
    assert vqa.vqa_accuracy(items).headline == 0.0
    assert vqa.vqa_accuracy(items, profile=CORRECTED).headline == 100.0


def test_nothing_to_score_is_not_a_number() -> None:
    assert (
        math.isnan(vqa.vqa_accuracy([]).headline)
        and math.isnan(vqa.textvqa_accuracy([]).headline)
        and math.isnan(vqa.vizwiz_accuracy([]).headline)
    )


def test_textvqa_needs_ten_answers() -> None:
    with pytest.raises(DataError, match="TextVQA question 1 has 9 answers, not 10"):
        vqa.textvqa_accuracy([VqaItem("x", ["x"] * 10), VqaItem("x", ["x"] * 9)])


def test_vizwiz_takes_any_number_of_answers() -> None:
    assert vqa.vizwiz_accuracy([VqaItem("x", []), VqaItem("x", ["x"] * 5)]).headline == 50.0


SHORT = "Answer the question using a single word or phrase."
PROMPTS = [
    ("two lines", f"What is it?\n{SHORT}", "what is it?"),
    ("three lines with OCR tokens", f"What IS it?\nReference OCR token: a, b\n{SHORT}", "what is it?"),
    ("OCR tokens first", f"Reference OCR token: a\nWhat?\n{SHORT}", "what?"),
    ("OCR tokens, none found", f"What?\nReference OCR token: \n{SHORT}", "what?"),
    ("two lines, OCR on the first", f"Reference OCR token: a What?\n{SHORT}", "reference ocr token: a what?"),
    ("legacy", "OCR tokens: a, b. Question: What? Short answer:", "what?"),
    ("legacy over lines", "OCR tokens: a\nb. Question: What\nis? Short answer:", "what\nis?"),
    ("legacy, first of two", "OCR tokens: a. Question: X Short answer: Question: Y Short answer:", "x"),
    ("space stays", f" What? \n{SHORT}", " what? "),
]
QUESTIONS = rows(vqa, "textvqa_question", PROMPTS)


@pytest.mark.parametrize(("quirk", "call", "expected"), QUESTIONS, ids=[row[0] for row in QUESTIONS])
def test_question_of_a_prompt(quirk: str, call, expected: str) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize(
    "prompt", ["What?", f"What?\nand\n{SHORT}", f"a\nb\nReference OCR token: x\n{SHORT}", "OCR tokens: a\nWhat?"]
)
def test_prompt_without_question(prompt: str) -> None:
    with pytest.raises(DataError, match="no TextVQA question in the prompt"):
        vqa.textvqa_question(prompt)

"""MME: parsing, conversion, result files and scores, and detection of port errors."""

from __future__ import annotations

import math

import pytest
from port_errors import catches, names, rows, same

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.metrics import mme
from megatron_share4v.evaluate.metrics.mme import DIRECTIVE, MmeAnswer
from megatron_share4v.evaluate.metrics.profile import CORRECTED

# quirk, text, answer, corrected answer where it differs
TEXTS: list[tuple[str, ...]] = [
    ("Yes", "Yes", "yes"),
    ("No", "No", "no"),
    ("capitals", "YES", "yes"),
    ("period", "No.", "no"),
    ("line's end", "no\n", "no"),
    ("sentence", "Yes, it is", "yes"),
    ("nothing", "", "other"),
    ("something else", "cat", "other"),
    ("space before", " yes", "yes"),
    ("space before no", "  no", "no"),
    ("three spaces before no", "   no", "other", "no"),
    ("two spaces before yes", "  yes", "other", "yes"),
    ("quoted", '"no"', "no"),
    ("starred yes does not fit", "**yes", "other", "yes"),
    ("starred no does", "**no", "no"),
    ("no as a part", "Snow", "no", "other"),
    ("none", "none", "no", "other"),
    ("not", "not", "no", "other"),
    ("know", "know", "no", "other"),
    ("now", "Now", "no", "other"),
    ("eyes", "eyes", "yes", "other"),
    ("yes in the fifth character", "I, yes", "other"),
    ("no at the fourth", "I, no", "other"),
    ("no at the third", "I no", "no", "other"),
    ("yes before no", "yesno", "yes", "other"),
    ("answer is yes", "The answer is yes", "other"),
    ("1 for yes", "1", "other"),
]


def lines(*texts: str, truth: str = "YN") -> str:
    """A result file: two lines an image, truths Yes and No in turn."""
    words = {"Y": "Yes", "N": "No"}
    return "".join(f"{number // 2}.txt\tq\t{words[truth[number % 2]]}\t{text}\n" for number, text in enumerate(texts))


# quirk, file, then accuracy, acc+, points, others
FILES = [
    ("both right", lines("Yes", "No"), (1.0, 1.0, 200.0, 0)),
    ("one of two right", lines("Yes", "Yes"), (0.5, 0.0, 50.0, 0)),
    ("both wrong", lines("No", "Yes"), (0.0, 0.0, 0.0, 0)),
    ("right ones on two images", lines("Yes", "Yes", "No", "No"), (0.5, 0.0, 50.0, 0)),
    ("right ones on one image", lines("Yes", "No", "No", "Yes"), (0.5, 0.5, 100.0, 0)),
    ("neighbours of two images", lines("No", "No", "Yes", "Yes"), (0.5, 0.0, 50.0, 0)),
    ("other is wrong", lines("Yes", "cat"), (0.5, 0.0, 50.0, 1)),
    ("other twice", lines("dog", "cat"), (0.0, 0.0, 0.0, 2)),
    ("two truths alike", lines("No", "no", truth="NN"), (1.0, 1.0, 200.0, 0)),
    ("three images", lines("Yes", "No", "Yes", "No", "Yes", "x"), (5 / 6, 2 / 3, 5 / 6 * 100 + 2 / 3 * 100, 1)),
    ("tab in an answer drops the line", lines("Yes\tsure", "No"), (1.0, 0.0, 100.0, 0)),
    ("tab in an answer, other image whole", lines("Yes\tsure", "No", "Yes", "No"), (1.0, 0.5, 150.0, 0)),
    ("line breaks in two answers shift the pairs", lines("Yes\nsure", "No\nnot"), (1.0, 0.0, 100.0, 0)),
    ("carriage return ends a line too", lines("Yes\rsure", "No\rnot"), (1.0, 0.0, 100.0, 0)),
    ("empty answer", lines("", "No"), (0.5, 0.0, 50.0, 1)),
    ("nothing but broken lines", lines("a\tb", "c\td"), (math.nan, 0.0, math.nan, 0)),
    ("no lines", "", (math.nan, math.nan, math.nan, 0)),
    ("no line break at the end", lines("Yes", "No").rstrip(), (1.0, 1.0, 200.0, 0)),
]


def task(text: str) -> tuple[float, ...]:
    return tuple(vars(mme.calculate({"count": text}).tasks["count"]).values())


TABLE = rows(mme, "parse", [(quirk, text, answers[0]) for quirk, text, *answers in TEXTS])
TABLE += [(quirk, lambda text=text: task(text), expected) for quirk, text, expected in FILES]
MENDED = [(quirk, text, answers[-1]) for quirk, text, *answers in TEXTS]

parse, calculate = mme.parse, mme.calculate


def _whole_text(text: str, **_: object) -> str:
    return next((word for word in ("yes", "no") if word in text.lower()), "other")


def _starts(text: str, **_: object) -> str:
    return next((word for word in ("yes", "no") if text.lower().startswith(word)), "other")


def _without_broken(files: dict[str, str]) -> mme.MmeScores:
    pairs = {name: [*zip(text.splitlines(True)[::2], text.splitlines(True)[1::2])] for name, text in files.items()}
    return calculate(
        {name: "".join(a + b for a, b in kept if a.count("\t") == b.count("\t") == 3) for name, kept in pairs.items()}
    )


def _others_left_out(files: dict[str, str]) -> mme.MmeScores:
    found = calculate(files).tasks["count"]
    whole = sum(line.count("\t") == 3 for line in files["count"].splitlines())
    accuracy = found.accuracy * whole / ((whole - found.other) or math.nan)
    return mme.MmeScores(
        0.0,
        0.0,
        {"count": mme.MmeTask(accuracy, found.accuracy_plus, 100 * (accuracy + found.accuracy_plus), found.other)},
    )


def _pairs_by_truth(files: dict[str, str]) -> mme.MmeScores:
    """All first questions, then all second ones: as a shuffled or sorted answer file would pair them."""
    return calculate(
        {name: "".join([*text.splitlines(True)[::2], *text.splitlines(True)[1::2]]) for name, text in files.items()}
    )


PORT_ERRORS: dict[str, dict[str, object]] = {
    "whole text": {"parse": _whole_text},
    "at the start": {"parse": _starts},
    "stripped": {"parse": lambda text, **_: parse(text.strip())},
    "case counts": {"parse": lambda text, **_: parse(text if text == text.lower() else "-")},
    "3 characters": {"PREFIX": 3},
    "5 characters": {"PREFIX": 5},
    "first word": {"OFFICIAL": CORRECTED},
    "other means no": {"parse": lambda text, **_: "yes" if parse(text) == "yes" else "no"},
    "other left out": {"calculate": _others_left_out},
    "broken lines left out with their images": {"calculate": _without_broken},
    "pairs from elsewhere": {"calculate": _pairs_by_truth},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_case(quirk: str, call, expected: object) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, mme, PORT_ERRORS[name])


@pytest.mark.parametrize(("quirk", "text", "answer"), MENDED, ids=[row[0] for row in MENDED])
def test_corrected_answer(quirk: str, text: str, answer: str) -> None:
    assert mme.parse(text, profile=CORRECTED) == answer


def test_sums_of_ten_and_of_four_tasks() -> None:
    every = {name: lines("Yes", "No") for name in (*mme.PERCEPTION, *mme.COGNITION)}
    scores = mme.calculate(every | {"OCR": lines("Yes", "Yes")})
    assert (scores.perception, scores.cognition, scores.headline) == (1850.0, 800.0, 1850.0)
    incomplete = mme.calculate({name: text for name, text in every.items() if name != "scene"})
    assert math.isnan(incomplete.perception) and incomplete.cognition == 800.0


def test_files_that_are_no_pairs() -> None:
    with pytest.raises(DataError, match="count.txt has 3 lines, not two per image"):
        mme.calculate({"count": lines("Yes\nsure", "No")})
    with pytest.raises(DataError, match="count.txt:2: the truth is 'Maybe'"):
        mme.calculate({"count": lines("Yes", "No").replace("No\tNo", "Maybe\tNo")})


TRUTH = mme.parse_truth(
    "color", "0001.txt", "Is it red? Please answer yes or no.\tYes\r\nIs it blue?  Please answer yes or no.\tNo\n"
)
ASKED = [
    ("suffix put back", f"Is it red?\n{DIRECTIVE}", "Is it red? Please answer yes or no.\tYes"),
    ("two spaces", f"Is it blue?\n{DIRECTIVE}", "Is it blue?  Please answer yes or no.\tNo"),
    (
        "suffix still there",
        f"Is it red? Please answer yes or no.\n{DIRECTIVE}",
        "Is it red? Please answer yes or no.\tYes",
    ),
    ("no directive", "Is it red?", "Is it red? Please answer yes or no.\tYes"),
    ("directive in front", f"{DIRECTIVE}\nIs it red?", "Is it red? Please answer yes or no.\tYes"),
]


@pytest.mark.parametrize(("quirk", "prompt", "written"), ASKED, ids=[row[0] for row in ASKED])
def test_converter(quirk: str, prompt: str, written: str) -> None:
    answer = MmeAnswer("color/images/0001.jpg.png", prompt, "Yes")
    assert mme.convert([answer], TRUTH) == {"color": f"0001.txt\t{written}\tYes\n"}


def test_converter_keeps_order_and_text() -> None:
    answers = [MmeAnswer("color/0001.jpg", "Is it blue?", "No\nway\t"), MmeAnswer("color/0001.jpg", "Is it red?", "")]
    blue, red = (
        "0001.txt\tIs it blue?  Please answer yes or no.\tNo\t",
        "0001.txt\tIs it red? Please answer yes or no.\tYes\t",
    )
    assert mme.convert(answers, TRUTH) == {"color": f"{blue}No\nway\t\n{red}\n"}
    assert mme.convert(answers, TRUTH, profile=CORRECTED) == {"color": f"{blue}No way\n{red}\n"}


def test_converter_refuses_unknown_questions() -> None:
    with pytest.raises(
        DataError, match="MME has no question 'Is it green\\?  Please answer yes or no.' in color/0001.txt"
    ):
        mme.convert([MmeAnswer("color/0001.jpg", "Is it green?", "No")], TRUTH)
    with pytest.raises(DataError, match="color/0001.txt:1: 'Is it red\\?' is not a question, a tab and Yes or No"):
        mme.parse_truth("color", "0001.txt", "Is it red?")

"""MMBench: option inference, rotations, categories and judged rows, and detection of port errors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from port_errors import catches, names, rows, same

from megatron_share4v.evaluate.metrics import mmbench
from megatron_share4v.evaluate.metrics.mmbench import MmbenchRow

COLORS = {"A": "red", "B": "blue", "C": "green", "D": "yellow"}
TWO = {"A": "yes", "B": "no"}
LONG = {
    "A": "the man on the left holds a cup",
    "B": "the man on the right holds a cup",
    "C": "nobody",
    "D": "both of them",
}
PARTS = {"A": "dog", "B": "hot dog"}
# quirk, text, options, option
OPTIONS: list[tuple] = [
    ("letter", "B", COLORS, "B"),
    ("period", "B.", COLORS, "B"),
    ("brackets", "(B)", COLORS, "B"),
    ("square brackets", "[B]", COLORS, "B"),
    ("braces", "{B}", COLORS, "B"),
    ("colon", "B: blue", COLORS, "B"),
    ("starred", "**B**", COLORS, "B"),
    ("hash", "#B", COLORS, "B"),
    ("letter and text", "B. blue", COLORS, "B"),
    ("letter with another's text", "B. red", COLORS, "B"),
    ("sentence that ends with it", "The answer is B", COLORS, "B"),
    ("lower case is none", "b", COLORS, None),
    ("quotes keep it joined", '"B"', COLORS, None),
    ("hyphen keeps it joined", "B-blue", COLORS, "B"),
    ("slash keeps it joined", "B/C", COLORS, None),
    ("equals sign keeps it joined", "answer=B", COLORS, None),
    ("two letters", "A or B", COLORS, None),
    ("two letters, one text", "A or B, blue", COLORS, "B"),
    ("one letter twice", "B, B", COLORS, "B"),
    ("letter that is no option", "C", TWO, None),
    ("letter that is no option beside one", "B, not C", TWO, "B"),
    ("article as a letter", "A dog", COLORS, "A"),
    ("article as a letter against the text", "A blue car", COLORS, "A"),
    ("fourth word from the end", "B is the one", COLORS, "B"),
    ("article as a letter, fourth word from the end", "A dog is here", COLORS, "A"),
    ("fifth word from the end", "B is the right one", COLORS, None),
    ("fifth word from the end, its text", "B is the blue one", COLORS, "B"),
    ("fifth word from the end, another's text", "B is the red one", COLORS, "A"),
    ("first of two places counts", "B it is in fact B", COLORS, None),
    ("article far from the end", "A car that is clearly blue", COLORS, "B"),
    ("Z", "Z", COLORS, "Z"),
    ("Z in a sentence", "Z is what I would say about it", COLORS, "Z"),
    ("Z beside a letter", "B or Z", COLORS, "B"),
    ("Z beside two letters", "A, B or Z", COLORS, None),
    ("text", "blue", COLORS, "B"),
    ("text, capitals", "BLUE", COLORS, "B"),
    ("text in a sentence", "it is blue", COLORS, "B"),
    ("text as a part", "bluebird", COLORS, "B"),
    ("two texts", "red or blue", COLORS, None),
    ("text within another option's text", "hot dog", PARTS, None),
    ("text of the shorter option", "dog", PARTS, "A"),
    ("as long as twice all options", "x" * 31 + " blue", COLORS, "B"),
    ("longer than twice all options", "x" * 32 + " blue", COLORS, None),
    ("long options allow long answers", "I think the man on the right holds a cup here", LONG, "B"),
    ("part of an option's text", "the man", LONG, None),
    ("no option at all", "purple", COLORS, None),
    ("nothing", "", COLORS, None),
    ("an empty option is in every text", "purple", COLORS | {"D": ""}, "D"),
    ("an empty option makes two", "blue", COLORS | {"D": ""}, None),
    ("options with capitals", "eiffel tower", {"A": "Eiffel Tower", "B": "Big Ben"}, "A"),
    ("number as an option", "is 2", {"A": "1", "B": "2", "C": "3"}, "B"),
    ("number as an option, too long a sentence", "It is 2", {"A": "1", "B": "2", "C": "3"}, None),
    ("refusal", "Cannot determine the answer", COLORS, "Z"),
    ("refusal around a letter", "B. Cannot determine the answer", COLORS, "Z"),
    ("refusal about people", "Sorry, I can't help with images of people yet. B", COLORS, "Z"),
    ("refusal in lower case is none", "cannot determine the answer B", COLORS, "B"),
    ("failed request, though there is a letter", "Failed to obtain answer via API B", LONG, None),
    ("Chinese", "选项B", {"A": "红色", "B": "蓝色"}, None),
    ("Chinese text", "蓝色", {"A": "红色", "B": "蓝色"}, "B"),
    ("Chinese full stop keeps it joined", "B。", {"A": "红色", "B": "蓝色"}, None),
]
TABLE = rows(mmbench, "infer", OPTIONS)

infer, infer_option, infer_text = mmbench.infer, mmbench.infer_option, mmbench.infer_text


def _quantifier(answer: str, choices: Mapping[str, str]) -> str | None:
    """The guard that the script has for verbose runs only."""
    words = answer.translate(mmbench.SEPARATORS).split()
    return None if "A" in words and len(words) > 3 else infer_option(answer, choices)


def _last_place(answer: str, choices: Mapping[str, str]) -> str | None:
    words = answer.translate(mmbench.SEPARATORS).split()
    found = [word for word in words[-4:] if word in choices]
    return found[0] if len(set(found)) == 1 else None


PORT_ERRORS: dict[str, dict[str, object]] = {
    "letter anywhere, as in older versions": {"LAST_WORDS": 10**6},
    "letter in the last 3 words": {"LAST_WORDS": 3},
    "letter in the last 5 words": {"LAST_WORDS": 5},
    "last place of the letter": {"infer_option": _last_place},
    "guard against the article": {"infer_option": _quantifier},
    "first character": {"infer": lambda answer, choices: answer[0] if answer[:1] in choices else None},
    "capitals": {"infer_option": lambda answer, choices: infer_option(answer.upper(), choices)},
    "any word character ends a letter": {"SEPARATORS": str.maketrans(dict.fromkeys(".()[],:;!*#{}-/\"'=。", " "))},
    "fewer separators": {"SEPARATORS": str.maketrans(dict.fromkeys(".(),", " "))},
    "no text": {"infer_text": lambda answer, choices: None},
    "text with case": {
        "infer_text": lambda answer, choices: next((k for k, v in choices.items() if v and v in answer), None)
    },
    "first of several texts": {
        "infer_text": lambda answer, choices: next((k for k, v in choices.items() if v.lower() in answer.lower()), None)
    },
    "text must be all": {
        "infer_text": lambda answer, choices: next((k for k, v in choices.items() if v.lower() == answer.lower()), None)
    },
    "no limit on length": {
        "infer_text": lambda answer, choices: infer_text(answer, choices) or infer_text(answer[-9:], choices)
    },
    "text before letter": {
        "infer": lambda answer, choices: infer_text(answer, choices) or infer_option(answer, choices)
    },
    "no refusals": {"REFUSALS": ()},
    "failed requests are answers": {"API_FAILURE": "\0"},
    "Z is nothing": {"NONE_OF_THEM": "\0"},
    "nothing means A": {"infer": lambda answer, choices: infer(answer, choices) or "A"},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_option(quirk: str, call, expected: str | None) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, mmbench, PORT_ERRORS[name])


M = 1_000_000


def row(
    index: int, text: str, answer: str = "A", ability: str = "coarse_perception", category: str = "scene"
) -> MmbenchRow:
    return MmbenchRow(index, answer, text, COLORS, category, ability)


# quirk, rows, judged, hits
CIRCULAR = [
    ("one row right", [row(1, "A")], {}, {1: True}),
    ("one row wrong", [row(1, "B")], {}, {1: False}),
    ("all rotations right", [row(1, "A"), row(M + 1, "B", "B"), row(2 * M + 1, "C", "C")], {}, {1: True}),
    ("one rotation wrong", [row(1, "A"), row(M + 1, "A", "B"), row(2 * M + 1, "C", "C")], {}, {1: False}),
    ("last rotation wrong", [row(1, "A"), row(M + 1, "B", "B"), row(2 * M + 1, "A", "C")], {}, {1: False}),
    ("only the question wrong", [row(1, "B"), row(M + 1, "B", "B")], {}, {1: False}),
    (
        "always the same letter",
        [row(1, "A"), row(M + 1, "A", "B"), row(2 * M + 1, "A", "C"), row(3 * M + 1, "A", "D")],
        {},
        {1: False},
    ),
    (
        "rotations elsewhere in the file",
        [row(1, "A"), row(2, "A"), row(M + 2, "B", "B"), row(M + 1, "C", "B")],
        {},
        {1: False, 2: True},
    ),
    ("rotations first", [row(M + 1, "B", "B"), row(1, "A")], {}, {1: True}),
    ("rotations without their question", [row(M + 3, "A"), row(1, "A")], {}, {1: True}),
    ("text counts", [row(1, "red"), row(M + 1, "blue", "B")], {}, {1: True}),
    ("no option is wrong", [row(1, "A"), row(M + 1, "purple", "B")], {}, {1: False}),
    ("a judge reads it", [row(1, "A"), row(M + 1, "purple", "B")], {M + 1: "B"}, {1: True}),
    ("a judge reads it otherwise", [row(1, "A"), row(M + 1, "purple", "B")], {M + 1: "Z"}, {1: False}),
    ("no judge request about letters", [row(1, "B")], {1: "A"}, {1: False}),
    ("Z is wrong", [row(1, "Z")], {1: "A"}, {1: False}),
    ("neighbouring indices", [row(M - 1, "A"), row(M + M - 1, "B")], {}, {M - 1: False}),
]


@pytest.mark.parametrize(("quirk", "given", "judged", "hits"), CIRCULAR, ids=[case[0] for case in CIRCULAR])
def test_circular(quirk: str, given: list[MmbenchRow], judged: dict[int, str], hits: dict[int, bool]) -> None:
    scores = mmbench.score(given, judged=judged)
    assert scores.hits == hits
    assert scores.overall == sum(hits.values()) / len(hits) and scores.headline == 100 * scores.overall


CIRCULAR_ERRORS = {
    "every row for itself": lambda rows: {r.index: infer(r.prediction, r.choices) == r.answer for r in rows},
    "rotations by the first row's answer": lambda rows: {
        1: all(infer(r.prediction, r.choices) == rows[0].answer for r in rows)
    },
    "one right rotation suffices": lambda rows: {1: any(infer(r.prediction, r.choices) == r.answer for r in rows)},
    "majority of rotations": lambda rows: {
        1: sum(infer(r.prediction, r.choices) == r.answer for r in rows) * 2 > len(rows)
    },
    "neighbouring rows are a group": lambda rows: {
        1: all(infer(r.prediction, r.choices) == r.answer for r in rows[:2])
    },
    "open rows do not count": lambda rows: {1: all(infer(r.prediction, r.choices) in (r.answer, None) for r in rows)},
}


@pytest.mark.parametrize("name", CIRCULAR_ERRORS)
def test_circular_port_error_is_caught(name: str) -> None:
    assert any(
        CIRCULAR_ERRORS[name](given) != hits
        for _, given, judged, hits in CIRCULAR
        if not judged and len(hits) == 1 and 1 in hits
    )


def test_abilities_and_categories_count_questions() -> None:
    given = [
        row(1, "A"), row(M + 1, "B", "B"), row(2, "B"), row(M + 2, "B", "B"),
        row(3, "A", ability="logic_reasoning", category="future"),
        row(4, "purple", ability="finegrained_perception (cross-instance)", category="action"),
        row(5, "A", ability="new_ability", category="scene"), row(6, "A", ability="", category=""),
    ]  # fmt: skip
    scores = mmbench.score(given)
    assert scores.overall == 4 / 6
    assert scores.by_l2 == {"CP": 0.5, "FP-C": 0.0, "LR": 1.0, "new_ability": 1.0}
    assert scores.by_category == {"action": 0.0, "future": 1.0, "scene": 2 / 3}
    assert scores.open_rows == (4,)


def test_nothing_to_score_is_not_a_number() -> None:
    assert math.isnan(mmbench.score([]).overall)

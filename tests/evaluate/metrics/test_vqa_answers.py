"""Answer normalisers against official results, the contraction table, and detection of port errors."""

from __future__ import annotations

import re
import string

import pytest
from port_errors import catches, names, rows, same

from megatron_share4v.evaluate.metrics import vqa_answers
from megatron_share4v.evaluate.metrics.profile import CORRECTED

# quirk, text, EvalAI's form, VQAEval's where it differs
FORMS: list[tuple[str, ...]] = [
    ("plain", "cat", "cat"),
    ("empty", "", ""),
    ("upper case", "CAT", "cat"),
    ("beyond ASCII", "Café", "café"),
    ("space around", "  cat \n", "cat"),
    ("line break within", "red\ncar", "red car"),
    ("tab within", "red\tcar", "red car"),
    ("runs of spaces", "red   car", "red car"),
    ("article a", "a cat", "cat"),
    ("article an", "an owl", "owl"),
    ("article the, capital", "The cat", "cat"),
    ("article between", "in the car", "in car"),
    ("article alone", "the", ""),
    ("article as part of a word", "another", "another"),
    ("article beside a mark", "the-cat", "cat"),
    ("none is 0", "none", "0"),
    ("zero", "zero", "0"),
    ("one", "One", "1"),
    ("ten", "ten", "10"),
    ("eleven stays", "eleven", "eleven"),
    ("number word among words", "two dogs", "2 dogs"),
    ("number word after a hyphen", "twenty-one", "twenty 1"),
    ("number word within a word", "someone", "someone"),
    ("comma in a number", "1,000", "1000"),
    ("comma between words", "red,blue", "redblue", "red blue"),
    ("comma and space", "red, blue", "red blue"),
    ("comma in a number frees all marks", "1,000-2,000", "1000 2000", "10002000"),
    ("comma in a number frees a slash", "1,000/2", "1000 2", "10002"),
    ("comma after a digit only", "1,a-b", "1a b", "1 b"),
    ("question mark at the end", "what?", "what"),
    ("question mark within", "yes?no", "yesno", "yes no"),
    ("'s is detached", "dog's", "dog 's", "dog's"),
    ("'s of a capital", "DOG'S", "dog 's", "dog's"),
    ("contraction", "dont", "don't"),
    ("contraction, capitals", "DONT", "don't"),
    ("contraction at the front", "twas", "'twas"),
    ("contraction within", "oclock", "o'clock"),
    ("contraction among words", "it isnt red", "it isn't red"),
    ("contraction, other reading", "wed", "wed"),
    ("contraction of hed", "hed", "he'd"),
    ("its is no contraction", "its", "its"),
    ("capital I is dead", "Im", "im"),
    ("capital I've is dead", "Ive", "ive"),
    ("capital I'd've is dead", "Id've", "id've"),
    ("lets stays", "lets", "lets"),
    ("shes stays", "shes", "shes"),
    ("let's", "let's", "let 's", "let's"),
    ("somebody'd loses it", "somebody'd", "somebodyd"),
    ("someoned", "someoned", "someone'd"),
    ("couldnt've", "couldnt've", "couldn't've"),
    ("couldn'tve", "couldn'tve", "couldn't've"),
    ("hed've", "hed've", "he'd've"),
    ("wouldn'tve", "wouldn'tve", "wouldn't've"),
    ("somethingd've", "somethingd've", "something'd've"),
    ("whod've", "whod've", "who'd've"),
    ("mustnt've is not there", "mustnt've", "mustnt've"),
    ("yall'll", "yall'll", "y'all'll"),
    ("y'all'dve", "y'all'dve", "y'all'd've"),
    ("ow's'at", "ow's'at", "ow 's'at", "'ow's'at"),
    ("'ow'sat", "'ow'sat", "'ow 'sat", "'ow's'at"),
    ("slash", "red/blue", "red blue"),
    ("slash makes an article", "n/a", "n"),
    ("slash with spaces", "red / blue", "red blue"),
    ("one spaced mark decides for its kind", "a-b - c", "ab c"),
    ("a space before suffices", "x-y -z", "xy z"),
    ("a space after suffices", "x-y- z", "xy z"),
    ("decided by the text as it came", "x-y(-z", "x y z"),
    ("each kind for itself", "(red) x-y", "red x y"),
    ("quotes", '"stop"', "stop"),
    ("underscore", "x_y", "x y"),
    ("backslash", "x\\y", "x y"),
    ("exclamation mark", "yes!no", "yes no"),
    ("at sign", "x@y", "x y"),
    ("apostrophe stays", "rock'n'roll", "rock'n'roll"),
    ("colon stays", "10:30", "10:30"),
    ("percent stays", "50%", "50%"),
    ("ampersand stays", "salt & pepper", "salt & pepper"),
    ("period at the end", "cat.", "cat"),
    ("period in a number", "3.5", "3.5"),
    ("period after a number", "3.", "3"),
    ("period after a number, within", "1. 5", "1 5"),
    ("period before a number", ".5", ".5"),
    ("period between word and number", "x.5", "x.5"),
    ("periods of an abbreviation", "U.S.A", "usa"),
    ("32 periods go", "." * 32 + "x", "x"),
    ("the 33rd period stays", "." * 33 + "x", ".x"),
    ("periods kept by a digit do not count", "1.5 " + "." * 32, "1.5"),
]
TABLE = rows(vqa_answers, "normalise_evalai", [(f"EvalAI: {quirk}", text, forms[0]) for quirk, text, *forms in FORMS])
TABLE += rows(
    vqa_answers, "normalise_vqa_eval", [(f"VQAEval: {quirk}", text, forms[-1]) for quirk, text, *forms in FORMS]
)


def _spaces_only(text: str, *, profile: object = None) -> str:
    return vqa_answers.PERIOD.sub("", text.translate(str.maketrans(dict.fromkeys(vqa_answers.MARKS, " "))), count=32)


def _nothing_only(text: str, *, profile: object = None) -> str:
    return vqa_answers.PERIOD.sub("", text.translate(str.maketrans(dict.fromkeys(vqa_answers.MARKS, ""))), count=32)


def _on_the_changed_text(text: str, *, profile: object = None) -> str:
    for mark in vqa_answers.MARKS:
        apart = vqa_answers.COMMA_IN_NUMBER.search(text) or f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if apart else " ")
    return vqa_answers.PERIOD.sub("", text, count=32)


def _detached_too(text: str, *, profile: object = None) -> str:
    return vqa_answers.replace_words(
        vqa_answers.replace_punctuation(vqa_answers.trim(text.lower().replace("'s", " 's")))
    )


PORT_ERRORS: dict[str, dict[str, object]] = {
    "look-behind as it was meant": {"PERIOD": re.compile(r"(?<!\d)\.(?!\d)")},
    "every period goes": {"PERIOD": re.compile(r"\.")},
    "no limit on periods": {"MAX_PERIODS": 0},
    "one period": {"MAX_PERIODS": 1},
    "marks become spaces": {"replace_punctuation": _spaces_only},
    "marks vanish": {"replace_punctuation": _nothing_only},
    "marks tested on the changed text": {"replace_punctuation": _on_the_changed_text},
    "all of string.punctuation": {"MARKS": string.punctuation.replace(".", "")},
    "colon too": {"MARKS": vqa_answers.MARKS + ":"},
    "apostrophe too": {"MARKS": vqa_answers.MARKS + "'"},
    "no exclamation mark, as in the oldest script": {"MARKS": vqa_answers.MARKS.replace("!", "")},
    "no rule for commas in numbers": {"COMMA_IN_NUMBER": re.compile("(?!)")},
    "any comma frees marks": {"COMMA_IN_NUMBER": re.compile(",")},
    "comma after a digit frees marks": {"COMMA_IN_NUMBER": re.compile(r"\d,")},
    "articles stay": {"ARTICLES": ()},
    "no an": {"ARTICLES": ("a", "the")},
    "none stays": {"DIGITS": {word: digit for word, digit in vqa_answers.DIGITS.items() if word != "none"}},
    "numbers beyond ten": {"DIGITS": vqa_answers.DIGITS | {"eleven": "11"}},
    "no contractions": {"CONTRACTIONS": {}},
    "lets and shes repaired": {"CONTRACTIONS": vqa_answers.CONTRACTIONS | {"lets": "let's", "shes": "she's"}},
    "capital I alive": {"CONTRACTIONS": vqa_answers.CONTRACTIONS | {"im": "i'm", "ive": "i've"}},
    "somebody'd repaired": {"CONTRACTIONS": vqa_answers.CONTRACTIONS | {"somebody'd": "somebody'd"}},
    "only plain contractions": {
        "CONTRACTIONS": {key: word for key, word in vqa_answers.CONTRACTIONS.items() if key == word.replace("'", "")}
    },
    "EvalAI without its first step": {"normalise_evalai": lambda text: vqa_answers.normalise_vqa_eval(text)},
    "VQAEval with EvalAI's first step": {"normalise_vqa_eval": _detached_too},
}


@pytest.mark.parametrize(("quirk", "call", "expected"), TABLE, ids=names(TABLE))
def test_normal_form(quirk: str, call, expected: str) -> None:
    assert same(call(), expected)


@pytest.mark.parametrize("name", PORT_ERRORS)
def test_port_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(TABLE, monkeypatch, vqa_answers, PORT_ERRORS[name])


def test_contractions_are_the_official_ones_in_number_and_form() -> None:
    table = vqa_answers.CONTRACTIONS
    assert len(table) == 120
    regular = [key for key, word in table.items() if key == word.replace("'", "")]
    assert len(regular) == 75
    assert {key for key, word in table.items() if key == word} == {"let's", "she's"}
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in table.items())
    # Found in no other rule: a rule that gives one too many would have to lose another.
    assert not {
        "lets",
        "shes",
        "mustntve",
        "ill",
        "ild",
        "whatd",
        "howve",
        "were",
        "well",
        "its",
        "id",
        "wed",
        "shed",
        "hell",
        "shell",
    } & set(table)


def test_corrected_removes_all_periods() -> None:
    text = "." * 40 + "x"
    assert vqa_answers.normalise_evalai(text) == "." * 8 + "x"
    assert vqa_answers.normalise_evalai(text, profile=CORRECTED) == "x"
    assert vqa_answers.normalise_vqa_eval(text, profile=CORRECTED) == "x"

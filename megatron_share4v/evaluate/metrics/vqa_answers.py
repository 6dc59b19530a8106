"""Answer normalisers: VQAEval, and EvalAI (LLaVA's m4c evaluator), which first lower-cases and detaches 's.

Sources: GT-Vision-Lab/VQA vqaEval.py; EvalAIAnswerProcessor of LLaVA's m4c_evaluator.py. Both are equal after
the first step: m4c has a different rule for commas between digits, but has already deleted all commas.
"""

from __future__ import annotations

import re

from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile

MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The source has a misspelt look-behind (?!<=\d) to keep the period of "3."; it never matches, so only the next
# character decides.
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32  # the source passes re.UNICODE as the `count` of re.sub
COMMA_IN_NUMBER = re.compile(r"\d,\d")
_NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
ARTICLES = ("a", "an", "the")

_PLAIN = """\
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_WOULD_HAVE = "he I it she somebody someone something there they we who you"
_NOT_HAVE = "could had might should would"


def _contractions() -> dict[str, str]:
    """Build the official table of 120 contractions. Keys with a capital I never match: words are lower-cased before."""
    table = {word.replace("'", ""): word for word in _PLAIN.split()}
    for stem in _WOULD_HAVE.split():
        table |= dict.fromkeys((f"{stem}d've", f"{stem}'dve"), f"{stem}'d've")
    for stem in _NOT_HAVE.split():
        table |= dict.fromkeys((f"{stem}nt've", f"{stem}n'tve"), f"{stem}n't've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def replace_punctuation(text: str, *, profile: Profile = OFFICIAL) -> str:
    """Delete marks that are next to a space anywhere in `text`, or all if it has a comma between digits.

    Other marks become spaces.

    Then delete periods not followed by a digit: the first 32 (official, because a flag is passed as the count) or all
    (`corrected`).
    """
    number = COMMA_IN_NUMBER.search(text)
    cleaned = text
    for mark in MARKS:
        apart = number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if apart else " ")
    return PERIOD.sub("", cleaned, count=MAX_PERIODS if profile is OFFICIAL else 0)


def replace_words(text: str) -> str:
    """Lower-case; convert number words to digits, drop articles, restore contractions, join by single spaces."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def trim(text: str) -> str:
    """Replace line breaks and tabs and strip, as VQAEval does before every comparison."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_vqa_eval(text: str, *, profile: Profile = OFFICIAL) -> str:
    """Normalise like VQAEval, which skips this when the annotators agree (see `vqa.vqa_accuracy`)."""
    return replace_words(replace_punctuation(trim(text), profile=profile))


def normalise_evalai(text: str, *, profile: Profile = OFFICIAL) -> str:
    """Normalise like EvalAI (m4c): for TextVQA's score, and in the submissions for VQA-v2 and VizWiz."""
    return normalise_vqa_eval(
        text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip(), profile=profile
    )

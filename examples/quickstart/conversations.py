"""What the quickstart says and asks about its scenes, and how it scores.

Captions state every object's attributes, the relations of objects that follow
each other in the caption, and the background.  Questions have answers of one sentence.  The scoring
functions are pure: text in, numbers out.

A *fact* is a triple ``(subject, attribute, value)`` of strings.  The subject
is an object's colour (``"red"``) or ``"background"``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from examples.quickstart.scenes import (
    COLORS,
    PLACES,
    SHADES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    scene_rng,
)

__all__ = [
    "QUESTION_KINDS",
    "Fact",
    "Question",
    "answer_matches",
    "caption",
    "caption_attribute_accuracy",
    "caption_facts",
    "held_out_questions",
    "scene_questions",
    "stated_facts",
]

Fact = tuple[str, str, str]

QUESTION_KINDS = ("color", "shape", "place", "size", "count", "background")
_COUNTS = ("zero", "one", "two", "three")
# (what the question names an object by, what it asks for); no two objects of a scene share a colour or a place
_LINKS = (("color", "shape"), ("color", "size"), ("color", "place"), ("place", "color"))


@dataclass(frozen=True)
class Question:
    """One question about one scene; its answer is a sentence, of which ``value`` is the part that the picture decides."""

    kind: str
    text: str
    answer: str
    value: str


# --- captions ---------------------------------------------------------------


def _relations(first: SceneObject, second: SceneObject) -> tuple[str, ...]:
    """How ``first`` lies to ``second``: one or two of the four directions."""
    words = []
    if first.row != second.row:
        words.append("above" if first.row < second.row else "below")
    if first.column != second.column:
        words.append("left of" if first.column < second.column else "right of")
    return tuple(words)


def _name(item: SceneObject, given: str) -> str:
    return f"the {item.color} object" if given == "color" else f"the object at the {item.place}"


def _count_sentence(scene: Scene) -> str:
    count = len(scene.objects)
    return "There is one object." if count == 1 else f"There are {_COUNTS[count]} objects."


def _relation_sentence(first: SceneObject, second: SceneObject) -> str:
    return f"The {first.color} object is {' and '.join(_relations(first, second))} the {second.color} object."


def caption(scene: Scene) -> str:
    """The detailed caption of a scene, one line of English; the objects come in the order of their colours in ``COLORS``."""
    parts = [_count_sentence(scene)]
    for item in scene.objects:
        parts.append(f"The {item.color} object is a {item.size} {item.shape} at the {item.place}.")
    parts += [
        _relation_sentence(first, second) for first, second in zip(scene.objects, scene.objects[1:], strict=False)
    ]
    parts.append(f"The background is {scene.shade}.")
    return " ".join(parts)


def caption_facts(scene: Scene) -> frozenset[Fact]:
    """Every true fact that a full caption of ``scene`` states.

    Per object its size, shape and place (subject: its colour); per pair of
    objects that follow each other in the caption their one or two directions;
    one of the background.
    """
    facts: set[Fact] = {("background", "shade", scene.shade)}
    for item in scene.objects:
        facts.add((item.color, "size", item.size))
        facts.add((item.color, "shape", item.shape))
        facts.add((item.color, "place", item.place))
    for first, second in zip(scene.objects, scene.objects[1:], strict=False):
        facts.update((first.color, word, second.color) for word in _relations(first, second))
    return frozenset(facts)


def _one_of(words: Sequence[str]) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_DIRECTIONS = ("above", "below", "left of", "right of")
_OPPOSITE = {
    "above": "below",
    "below": "above",
    "left of": "right of",
    "right of": "left of",
}
_OBJECT_RE = re.compile(
    rf"\bthe {_one_of(COLORS)} object is a {_one_of(SIZES)} {_one_of(SHAPES)} at the {_one_of(PLACES)}\b"
)
_BACKGROUND_RE = re.compile(rf"\bthe background is {_one_of(SHADES)}\b")
_RELATION_RE = re.compile(
    rf"\bthe {_one_of(COLORS)} object is {_one_of(_DIRECTIONS)}(?: and {_one_of(_DIRECTIONS)})? the {_one_of(COLORS)} object\b"
)


def stated_facts(text: str) -> frozenset[Fact]:
    """The facts that a caption states; never an error, whatever the text.

    What a caption contradicts counts as not stated: two values for one
    attribute of one subject, or a direction and its opposite, cancel.
    """
    plain = " ".join(text.lower().split())
    values: dict[tuple[str, str], set[str]] = {}
    for color, size, shape, place in _OBJECT_RE.findall(plain):
        values.setdefault((color, "size"), set()).add(size)
        values.setdefault((color, "shape"), set()).add(shape)
        values.setdefault((color, "place"), set()).add(place)
    for shade in _BACKGROUND_RE.findall(plain):
        values.setdefault(("background", "shade"), set()).add(shade)
    facts = {(*key, next(iter(found))) for key, found in values.items() if len(found) == 1}
    related = {
        (one, word, two) for one, first, second, two in _RELATION_RE.findall(plain) for word in (first, second) if word
    }
    return frozenset(
        facts | {(one, word, two) for one, word, two in related if (one, _OPPOSITE[word], two) not in related}
    )


def caption_attribute_accuracy(scenes: Sequence[Scene], captions: Sequence[str]) -> float:
    """Share (0 to 1) of the scenes' true facts that their captions state.

    ``captions[i]`` is judged against ``scenes[i]``.  Raises ``ValueError``
    when the two differ in length or are empty.
    """
    if len(scenes) != len(captions) or not scenes:
        raise ValueError(f"{len(scenes)} scenes for {len(captions)} captions")
    stated = total = 0
    for scene, text in zip(scenes, captions, strict=True):
        facts = caption_facts(scene)
        stated += len(facts & stated_facts(text))
        total += len(facts)
    return stated / total


# --- questions --------------------------------------------------------------


def _attribute_question(item: SceneObject, given: str, asked: str) -> Question:
    name, value = (
        f"the {item.color} object" if given == "color" else f"the object at the {item.place}",
        str(getattr(item, asked)),
    )
    text = f"Where is {name}?" if asked == "place" else f"What {asked} is {name}?"
    said = {"shape": f"a {value}", "place": f"at the {value}"}.get(asked, value)
    return Question(kind=asked, text=text, answer=f"{name[0].upper()}{name[1:]} is {said}.", value=value)


def _scene_wide_questions(scene: Scene) -> list[Question]:
    count = _COUNTS[len(scene.objects)]
    return [
        Question("count", "How many objects are there?", _count_sentence(scene), count),
        Question("background", "What color is the background?", f"The background is {scene.shade}.", scene.shade),
    ]


def scene_questions(scene: Scene, limit: int, rng: Random) -> list[Question]:
    """Up to ``limit`` questions in random order, for one conversation.

    No answer can be read off the turns before it: once two attributes of an
    object are linked by questions, no later question links them again.
    """
    found = _scene_wide_questions(scene)
    for item in scene.objects:
        group = {name: name for name in ("shape", "color", "place", "size")}
        for given, asked in rng.sample(_LINKS, len(_LINKS)):
            if group[given] == group[asked]:
                continue
            old, new = group[asked], group[given]
            group = {name: new if label == old else label for name, label in group.items()}
            found.append(_attribute_question(item, given, asked))
    rng.shuffle(found)
    return found[:limit]


def _candidates(scene: Scene) -> list[Question]:
    """Every question that could be asked of one held-out scene."""
    found = _scene_wide_questions(scene)
    for item in scene.objects:
        found += [_attribute_question(item, given, asked) for given, asked in _LINKS]
    scene_rng(scene.seed, scene.split, scene.index, "candidates").shuffle(found)
    return found


def held_out_questions(scenes: Sequence[Scene], per_kind: int) -> list[tuple[int, Question]]:
    """``per_kind`` questions of each kind as ``(index into scenes, question)``.

    Within a kind the values take turns, so each is right equally
    often (to within one) and asking without looking earns chance: 1/6 for a
    colour, 1/4 for a shape, 1/9 for a place, 1/3 for a count, 1/4
    for a background, 1/2 for a size.  A scene is asked at most
    one question per kind.  Raises ``ValueError`` when the scenes are too few.
    """
    pools: dict[str, dict[str, list[tuple[int, Question]]]] = {k: {} for k in QUESTION_KINDS}
    for index, scene in enumerate(scenes):
        for question in _candidates(scene):
            pools[question.kind].setdefault(question.value, []).append((index, question))
    chosen: list[tuple[int, Question]] = []
    for kind in QUESTION_KINDS:
        used: set[int] = set()
        answers = sorted(pools[kind])
        for turn in range(per_kind):
            pool = pools[kind][answers[turn % len(answers)]] if answers else []
            free = next((entry for entry in pool if entry[0] not in used), None)
            if free is None:
                raise ValueError(f"{len(scenes)} scenes are too few for {per_kind} questions on {kind}")
            used.add(free[0])
            chosen.append(free)
    return chosen


def answer_matches(generated: str, answer: str) -> bool:
    """Whether a generated answer is the right one: equal but for case, outer
    space and one full stop at the end."""
    return generated.strip().lower().removesuffix(".") == answer.lower().removesuffix(".")

"""Captions of and questions about the quickstart's scenes, and the scoring of generated text against them.

A caption states every object's attributes, the relations of consecutive objects, and the background. Every question is
answered in one sentence. The scoring functions are pure: text in, numbers out.

A *fact* is a triple `(subject, attribute, value)` of strings; its subject is an object's colour or "background".
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

Fact = tuple[str, str, str]

QUESTION_KINDS = ("color", "shape", "place", "size", "count", "background")
_COUNTS = ("zero", "one", "two", "three")
# (attribute that identifies the object, attribute asked for); no two objects of a scene share a colour or a place
_LINKS = (("color", "shape"), ("color", "size"), ("color", "place"), ("place", "color"))
# Training asks for the colour at a place, which is learned last, twice as often as for the place of a colour.
_TRAINED_LINKS = (*_LINKS, ("place", "color"))


@dataclass(frozen=True)
class SceneQuestion:
    """One question about one scene; `answer` is a sentence, `value` the part of it that depends on the image."""

    kind: str
    text: str
    answer: str
    value: str


# --- captions ---------------------------------------------------------------


def _relations(first: SceneObject, second: SceneObject) -> tuple[str, ...]:
    """Return the position of `first` relative to `second`: one or two of the four directions."""
    words = []
    if first.row != second.row:
        words.append("above" if first.row < second.row else "below")
    if first.column != second.column:
        words.append("left of" if first.column < second.column else "right of")
    return tuple(words)


def _count_sentence(scene: Scene) -> str:
    count = len(scene.objects)
    return "There is one object." if count == 1 else f"There are {_COUNTS[count]} objects."


def _relation_sentence(first: SceneObject, second: SceneObject) -> str:
    return f"The {first.color} object is {' and '.join(_relations(first, second))} the {second.color} object."


def caption(scene: Scene) -> str:
    """Return the detailed caption of a scene, one line of English; objects are sorted by colour as in `COLORS`."""
    parts = [_count_sentence(scene)]
    for item in scene.objects:
        parts.append(f"The {item.color} object is a {item.size} {item.shape} at the {item.place}.")
    parts += [
        _relation_sentence(first, second) for first, second in zip(scene.objects, scene.objects[1:], strict=False)
    ]
    parts.append(f"The background is {scene.shade}.")
    return " ".join(parts)


def caption_facts(scene: Scene) -> frozenset[Fact]:
    """Return every true fact that a complete caption of `scene` states.

    Size, shape and place of each object (subject: its colour), one or two directions for each pair of consecutive
    objects, and the background's shade.
    """
    facts: set[Fact] = {("background", "shade", scene.shade)}
    for item in scene.objects:
        facts.add((item.color, "size", item.size))
        facts.add((item.color, "shape", item.shape))
        facts.add((item.color, "place", item.place))
    for first, second in zip(scene.objects, scene.objects[1:], strict=False):
        facts.update((first.color, word, second.color) for word in _relations(first, second))
    return frozenset(facts)


def _alternatives(words: Sequence[str]) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_DIRECTIONS = ("above", "below", "left of", "right of")
_OPPOSITE = {
    "above": "below",
    "below": "above",
    "left of": "right of",
    "right of": "left of",
}
_OBJECT_RE = re.compile(
    rf"\bthe {_alternatives(COLORS)} object is a {_alternatives(SIZES)} {_alternatives(SHAPES)} "
    rf"at the {_alternatives(PLACES)}\b"
)
_BACKGROUND_RE = re.compile(rf"\bthe background is {_alternatives(SHADES)}\b")
_RELATION_RE = re.compile(
    rf"\bthe {_alternatives(COLORS)} object is {_alternatives(_DIRECTIONS)}(?: and {_alternatives(_DIRECTIONS)})? "
    rf"the {_alternatives(COLORS)} object\b"
)


def stated_facts(text: str) -> frozenset[Fact]:
    """Parse the facts that a caption states; any text is accepted.

    Contradictions count as not stated: two values for one attribute of one subject, or a direction and its opposite.
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
    """Return the fraction (0 to 1) of the scenes' true facts that their captions state.

    `captions[i]` is compared with `scenes[i]`. Raises ValueError when the two differ in length or are empty.
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


def _attribute_question(item: SceneObject, given: str, requested: str) -> SceneQuestion:
    name = f"the {item.color} object" if given == "color" else f"the object at the {item.place}"
    value = str(getattr(item, requested))
    text = f"Where is {name}?" if requested == "place" else f"What {requested} is {name}?"
    predicate = {"shape": f"a {value}", "place": f"at the {value}"}.get(requested, value)
    return SceneQuestion(kind=requested, text=text, answer=f"{name[0].upper()}{name[1:]} is {predicate}.", value=value)


def _scene_wide_questions(scene: Scene) -> list[SceneQuestion]:
    count = _COUNTS[len(scene.objects)]
    return [
        SceneQuestion("count", "How many objects are there?", _count_sentence(scene), count),
        SceneQuestion("background", "What color is the background?", f"The background is {scene.shade}.", scene.shade),
    ]


def scene_questions(scene: Scene, limit: int, rng: Random) -> list[SceneQuestion]:
    """Return up to `limit` questions in random order, for one conversation.

    Questions that link a colour and a place are preferred: such a pair is asked in one of its two directions only, so
    each direction would be half as frequent as questions about shape or size. No answer follows from earlier turns:
    once two attributes of an object are linked by questions, directly or through others, no later question links them
    again.
    """
    found = _scene_wide_questions(scene)
    for item in scene.objects:
        group = {name: name for name in ("shape", "color", "place", "size")}
        for given, requested in rng.sample(_TRAINED_LINKS, len(_TRAINED_LINKS)):
            if group[given] == group[requested]:
                continue
            old, new = group[requested], group[given]
            group = {name: new if label == old else label for name, label in group.items()}
            found.append(_attribute_question(item, given, requested))
    rng.shuffle(found)
    chosen = sorted(found, key=lambda question: question.kind not in ("color", "place"))[:limit]
    rng.shuffle(chosen)
    return chosen


def _candidates(scene: Scene) -> list[SceneQuestion]:
    """Return every possible question about one held-out scene, shuffled."""
    found = _scene_wide_questions(scene)
    for item in scene.objects:
        found += [_attribute_question(item, given, requested) for given, requested in _LINKS]
    scene_rng(scene.seed, scene.split, scene.index, "candidates").shuffle(found)
    return found


def held_out_questions(scenes: Sequence[Scene], per_kind: int) -> list[tuple[int, SceneQuestion]]:
    """Choose `per_kind` questions of each kind, as `(index into scenes, question)`.

    Within a kind all answers are equally frequent (to within one), so answering without the image scores chance: 1/6
    for a colour, 1/5 for a shape, 1/9 for a place, 1/3 for a count, 1/4 for a background, 1/2 for a size. A scene has
    at most one question of each kind. Raises ValueError when there are too few scenes.
    """
    pools: dict[str, dict[str, list[tuple[int, SceneQuestion]]]] = {k: {} for k in QUESTION_KINDS}
    for index, scene in enumerate(scenes):
        for question in _candidates(scene):
            pools[question.kind].setdefault(question.value, []).append((index, question))
    chosen: list[tuple[int, SceneQuestion]] = []
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
    """Whether a generated answer is right: equal up to case, surrounding white space and one final full stop."""
    return generated.strip().lower().removesuffix(".") == answer.lower().removesuffix(".")

"""Tests of the quickstart's data set: determinism, consistency of text and scenes, balance of answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from examples.quickstart.conversations import (
    QUESTION_KINDS,
    answer_matches,
    caption,
    caption_attribute_accuracy,
    caption_facts,
    held_out_questions,
    scene_questions,
    stated_facts,
)
from examples.quickstart.dataset import IMAGE_SIZE, load_held_out, write_dataset
from examples.quickstart.scenes import _COLOR_RGB, Scene, draw_scene, make_scene

SEED = 7
CHANCE = {
    "color": 1 / 6,
    "shape": 1 / 5,
    "place": 1 / 9,
    "size": 1 / 2,
    "count": 1 / 3,
    "background": 1 / 4,
}


def _scenes(count: int, split: str = "train") -> list[Scene]:
    return [make_scene(SEED, split, index) for index in range(count)]


def _true_value(scene: Scene, text: str) -> str | None:
    """Recompute the answer to a question from its text; None if the scene has no such object."""
    if text == "How many objects are there?":
        return ("zero", "one", "two", "three")[len(scene.objects)]
    by_color = {item.color: item for item in scene.objects}
    place = re.fullmatch(r"Where is the (.+)\?", text)
    asked, name = ("place", place[1]) if place else re.fullmatch(r"What (\w+) is the (.+)\?", text).groups()
    if name == "background":
        return scene.shade
    by_place = {f"object at the {item.place}": item for item in scene.objects}
    item = by_place.get(name) or by_color.get(name.removesuffix(" object"))
    return getattr(item, asked) if item else None


def test_scene_is_a_function_of_seed_split_and_index() -> None:
    assert _scenes(50) == _scenes(50)
    assert make_scene(SEED, "train", 3) != make_scene(SEED + 1, "train", 3)
    kinds = {(s.objects, s.shade_tint) for s in _scenes(200) + _scenes(200, "held_out")}
    assert len(kinds) == 400


def test_scene_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split"):
        make_scene(SEED, "test", 0)
    with pytest.raises(ValueError, match="index"):
        make_scene(SEED, "train", -1)
    with pytest.raises(ValueError, match="image_size"):
        draw_scene(make_scene(SEED, "train", 0), 8)


def test_objects_have_apart_shapes_colors_and_places() -> None:
    counts: Counter[int] = Counter()
    for scene in _scenes(300):
        counts[len(scene.objects)] += 1
        for name in ("shape", "color", "place"):
            values = [getattr(item, name) for item in scene.objects]
            assert len(set(values)) == len(values)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 70


def test_picture_is_deterministic_and_shows_the_object() -> None:
    for scene in _scenes(40):
        picture = draw_scene(scene, IMAGE_SIZE)
        assert picture.mode == "RGB"
        assert picture.size == (IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.asarray(picture, dtype=np.int64)
        assert np.array_equal(pixels, np.asarray(draw_scene(scene, IMAGE_SIZE)))
        third = IMAGE_SIZE // 3
        for item in scene.objects:
            cell = pixels[
                item.row * third : (item.row + 1) * third,
                item.column * third : (item.column + 1) * third,
            ]
            wanted = np.array(_COLOR_RGB[item.color]) + np.array(item.tint)
            near = np.abs(cell - wanted).max(axis=-1) < 45
            assert near.mean() > 0.04, (scene.name, item)


def test_caption_round_trip_and_swap() -> None:
    scenes = _scenes(300)
    captions = [caption(scene) for scene in scenes]
    for scene, text in zip(scenes, captions, strict=True):
        assert stated_facts(text) == caption_facts(scene)
    assert caption_attribute_accuracy(scenes, captions) == 1.0
    swapped = captions[1:] + captions[:1]
    assert caption_attribute_accuracy(scenes, swapped) < 0.25
    assert caption_attribute_accuracy(scenes, [""] * len(scenes)) == 0.0


def test_caption_accuracy_counts_facts() -> None:
    scene = next(s for s in _scenes(50) if len(s.objects) == 1)
    item = scene.objects[0]
    other = "small" if item.size == "large" else "large"
    text = caption(scene).replace(item.size, other)
    assert caption_attribute_accuracy([scene], [text]) == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="captions"):
        caption_attribute_accuracy([scene], [])


def test_contradicting_captions_state_nothing() -> None:
    text = (
        "The red object is a large cross at the top. The red object is a small cross at the top. "
        "The red object is above the blue object. The red object is below the blue object."
    )
    assert stated_facts(text) == {("red", "shape", "cross"), ("red", "place", "top")}
    assert stated_facts("nonsense \u0000 words") == frozenset()


def test_answers_are_right() -> None:
    for scene in _scenes(200):
        for question in scene_questions(scene, 99, Random(scene.index)):
            assert _true_value(scene, question.text) == question.value
            assert question.value in question.answer and question.answer.endswith(".")
            assert question.kind in QUESTION_KINDS


def test_no_answer_follows_from_earlier_turns() -> None:
    """No question links two attributes of an object that earlier turns already link."""
    for scene in _scenes(200):
        asked = [q.text for q in scene_questions(scene, 99, Random(scene.index))]
        assert len(set(asked)) == len(asked)
        for item in scene.objects:
            mine = [
                t for t in asked if t.endswith((f"is the {item.color} object?", f"is the object at the {item.place}?"))
            ]
            assert len(mine) == 3  # a tree over four attributes


def test_held_out_questions_are_balanced_and_swap_to_chance() -> None:
    scenes = _scenes(400, "held_out")
    chosen = held_out_questions(scenes, 90)
    assert len(chosen) == 90 * len(QUESTION_KINDS)
    for kind in QUESTION_KINDS:
        mine = [(index, q) for index, q in chosen if q.kind == kind]
        assert len({index for index, _ in mine}) == len(mine) == 90
        counts = Counter(q.value for _, q in mine)
        assert len(counts) == round(1 / CHANCE[kind])
        assert max(counts.values()) - min(counts.values()) <= 1
        for index, question in mine:
            assert _true_value(scenes[index], question.text) == question.value
        hits = total = 0
        for index, question in mine:
            for other in scenes[:100]:
                found = _true_value(other, question.text)
                if other is not scenes[index] and found is not None:
                    hits += found == question.value
                    total += 1
        assert hits / total == pytest.approx(CHANCE[kind], abs=0.08), kind


def test_questions_do_not_give_their_answers_away() -> None:
    """Over many scenes, no question text has a preferred answer."""
    answers: dict[str, Counter[str]] = {}
    for scene in _scenes(3000):
        for question in scene_questions(scene, 99, Random(scene.index)):
            answers.setdefault(question.text, Counter())[question.value] += 1
            assert question.value not in question.text.rstrip("?").split()
    for text, counts in answers.items():
        if counts.total() >= 150:
            kind = len(counts)
            assert counts.most_common(1)[0][1] / counts.total() < 1 / kind + 0.12, text


def test_held_out_questions_need_enough_scenes() -> None:
    with pytest.raises(ValueError, match="too few"):
        held_out_questions(_scenes(10, "held_out"), 9)


def test_write_dataset(tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "data"
    counts = write_dataset(out, train_scenes=100, held_out_scenes=64, seed=SEED, image_size=48, progress=lines.append)
    assert lines and "164" in lines[-1]
    pretrain = json.loads((out / "pretrain.json").read_text())
    finetune = json.loads((out / "finetune.json").read_text())
    assert counts["pretrain"] == len(pretrain) == 100
    assert counts["finetune"] == len(finetune) == 100 + counts["text_only"]
    assert sum("image" not in record for record in finetune) == counts["text_only"] > 0
    assert len({record["id"] for record in pretrain + finetune}) == len(pretrain + finetune)
    for record in pretrain + finetune:
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        marks = [t["value"].count("<image>") for t in turns]
        assert marks == [int("image" in record)] + [0] * (len(turns) - 1)
        if "image" in record:
            assert turns[0]["value"].startswith("<image>\n")
            with Image.open(out / record["image"]) as picture:
                assert picture.size == (48, 48)
    assert all(len(record["conversations"]) == 2 for record in pretrain)

    scenes, questions = load_held_out(out / "held_out.json")
    assert [scene for scene, _ in scenes] == _scenes(64, "held_out")
    assert len(questions) == counts["questions"] == 16 * len(QUESTION_KINDS)
    by_image = {image: scene for scene, image in scenes}
    for question in questions:
        assert question.image != question.other_image
        assert (out / question.other_image).is_file()
        assert _true_value(by_image[question.image], question.question) in question.answer

    first = {p.name: p.read_bytes() for p in sorted(out.rglob("*.*")) if p.is_file()}
    write_dataset(out, train_scenes=100, held_out_scenes=64, seed=SEED, image_size=48, progress=lines.append)
    assert first == {p.name: p.read_bytes() for p in sorted(out.rglob("*.*")) if p.is_file()}


def test_write_dataset_refuses_too_few_scenes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held-out"):
        write_dataset(tmp_path, train_scenes=10, held_out_scenes=5, seed=SEED)


def test_load_held_out_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "held_out.json"
    path.write_text('{"scenes": [{}], "questions": []}')
    with pytest.raises(ValueError, match="held_out"):
        load_held_out(path)


def test_answer_matches() -> None:
    assert answer_matches(" Top left.", "top left")
    assert not answer_matches("top", "top left")
    assert not answer_matches("", "red")

"""The data set that the quickstart draws for itself.

:func:`write_dataset` draws scenes (:mod:`.quickstart_scenes`), says and asks
things about them (:mod:`.quickstart_text`) and writes ShareGPT4V JSON::

    out_dir/images/train_000000.png ...
    out_dir/pretrain.json    stage 1: one detailed caption per training scene
    out_dir/finetune.json    stage 2: conversations about training scenes
    out_dir/held_out.json    scenes and questions that training never sees

Everything written is a pure function of ``seed`` and the scene's number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.conversations import (
    QUESTION_KINDS,
    Question,
    answer_matches,
    caption,
    caption_attribute_accuracy,
    caption_facts,
    held_out_questions,
    scene_questions,
    stated_facts,
)
from examples.quickstart.scenes import (
    COLORS,
    PLACES,
    SHAPES,
    Scene,
    draw_scene,
    make_scene,
    scene_rng,
)

__all__ = [
    "CAPTION_REQUESTS",
    "IMAGE_SIZE",
    "QUESTION_KINDS",
    "HeldOutQuestion",
    "Question",
    "Scene",
    "answer_matches",
    "caption",
    "caption_attribute_accuracy",
    "caption_facts",
    "draw_scene",
    "finetune_record",
    "held_out_questions",
    "load_held_out",
    "make_scene",
    "pretrain_record",
    "scene_questions",
    "stated_facts",
    "text_only_record",
    "write_dataset",
]

IMAGE_SIZE = 72  # pixels, edge of every picture
TURNS = 6  # question-answer turns of one conversation, at most
CAPTION_SHARE = 0.1  # of the stage-2 records ask for the detailed caption
TEXT_ONLY_SHARE = 0.04  # text-only records per training scene, stage 2
CAPTION_REQUESTS = (
    "Describe this image in detail.",
    "What is in this image? Describe it in detail.",
    "Write a detailed caption for this image.",
)

Record = dict[str, Any]


def _conversation(pairs: list[tuple[str, str]], *, image: bool) -> list[dict[str, str]]:
    turns = []
    for number, (human, gpt) in enumerate(pairs):
        prefix = "<image>\n" if image and number == 0 else ""
        turns.append({"from": "human", "value": prefix + human})
        turns.append({"from": "gpt", "value": gpt})
    return turns


def _image_name(scene: Scene) -> str:
    return f"images/{scene.name}.png"


def pretrain_record(scene: Scene) -> Record:
    """The stage-1 record of a scene: a request and its detailed caption."""
    rng = scene_rng(scene.seed, scene.split, scene.index, "pretrain")
    pairs = [(rng.choice(CAPTION_REQUESTS), caption(scene))]
    return {
        "id": f"pretrain_{scene.name}",
        "image": _image_name(scene),
        "conversations": _conversation(pairs, image=True),
    }


def finetune_record(scene: Scene) -> Record:
    """The stage-2 record of a scene: up to six questions, each answered in a sentence,
    or (one scene in ten) a request for the detailed caption."""
    rng = scene_rng(scene.seed, scene.split, scene.index, "finetune")
    if rng.random() < CAPTION_SHARE:
        pairs = [(rng.choice(CAPTION_REQUESTS), caption(scene))]
    else:
        pairs = [(q.text, q.answer) for q in scene_questions(scene, TURNS, rng)]
    return {
        "id": f"finetune_{scene.name}",
        "image": _image_name(scene),
        "conversations": _conversation(pairs, image=True),
    }


_NUMBERS = ("one", "two", "three")
_OPPOSITES = (
    ("left", "right"),
    ("above", "below"),
    ("top", "bottom"),
    ("small", "large"),
    ("black", "white"),
)


def text_only_record(seed: int, index: int) -> Record:
    """A stage-2 record without a picture: two to four turns about words."""
    rng = scene_rng(seed, "train", index, "text_only")
    pairs = []
    for _ in range(rng.randint(2, 4)):
        kind = rng.randrange(3)
        if kind == 0:
            word = rng.choice(COLORS + SHAPES + PLACES)
            pairs.append((f"Repeat after me: {word}", word))
        elif kind == 1:
            pair = rng.choice(_OPPOSITES)
            first, second = pair if rng.random() < 0.5 else pair[::-1]
            pairs.append((f"What is the opposite of {first}?", second))
        else:
            number = rng.randrange(2)
            pairs.append((f"What number comes after {_NUMBERS[number]}?", _NUMBERS[number + 1]))
    return {
        "id": f"finetune_text_{index:06d}",
        "conversations": _conversation(pairs, image=False),
    }


@dataclass(frozen=True)
class HeldOutQuestion:
    """A held-out question, its own picture and another scene's picture.

    ``image`` and ``other_image`` are paths relative to the data set's
    folder.  The other scene is drawn without looking at its answer.
    """

    image: str
    other_image: str
    kind: str
    question: str
    answer: str


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _held_out(scenes: list[Scene], per_kind: int) -> dict[str, Any]:
    count = len(scenes)
    questions = []
    for number, (index, question) in enumerate(held_out_questions(scenes, per_kind)):
        other = scenes[(index + 1 + number % (count - 1)) % count]
        questions.append(
            {
                "image": _image_name(scenes[index]),
                "other_image": _image_name(other),
                "kind": question.kind,
                "question": question.text,
                "answer": question.answer,
            }
        )
    return {
        "scenes": [
            {
                "seed": scene.seed,
                "index": scene.index,
                "image": _image_name(scene),
                "request": CAPTION_REQUESTS[0],
                "caption": caption(scene),
            }
            for scene in scenes
        ],
        "questions": questions,
    }


def load_held_out(path: str | Path) -> tuple[list[tuple[Scene, str]], list[HeldOutQuestion]]:
    """Read ``held_out.json``: ``[(scene, its picture's path)]`` and the questions.

    Raises ``OSError`` when the file cannot be read and ``ValueError`` when it
    is not what :func:`write_dataset` writes.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        scenes = [
            (make_scene(entry["seed"], "held_out", entry["index"]), str(entry["image"])) for entry in content["scenes"]
        ]
        questions = [HeldOutQuestion(**entry) for entry in content["questions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a held_out.json of the quickstart: {error}") from error
    return scenes, questions


def _print_progress(line: str) -> None:
    print(line, flush=True)


def write_dataset(
    out_dir: str | Path,
    *,
    train_scenes: int,
    held_out_scenes: int,
    seed: int,
    image_size: int = IMAGE_SIZE,
    progress: Callable[[str], None] = _print_progress,
) -> dict[str, int]:
    """Draw the whole data set into ``out_dir`` (made if it is not there).

    ``image_size`` is in pixels.  ``progress`` gets one line of text per 1,000
    pictures and one at the end.  Held-out questions: ``held_out_scenes // 4``
    of each of the eight kinds, at most one of each kind per scene.  Returns counts: ``train_images``, ``held_out_images``,
    ``pretrain``, ``finetune``, ``text_only``, ``questions``.

    Raises ``ValueError`` for fewer than 1 training or 64 held-out scenes
    (below that the answers cannot be balanced) and ``OSError`` when a file
    cannot be written.  An interrupted call can be repeated: files are
    overwritten and the JSON files come last.
    """
    if train_scenes < 1 or held_out_scenes < 64:
        raise ValueError(f"need 1 training and 64 held-out scenes or more, not {train_scenes} and {held_out_scenes}")
    out = Path(out_dir)
    (out / "images").mkdir(parents=True, exist_ok=True)
    train = [make_scene(seed, "train", index) for index in range(train_scenes)]
    held_out = [make_scene(seed, "held_out", index) for index in range(held_out_scenes)]
    total = train_scenes + held_out_scenes
    for number, scene in enumerate(train + held_out, start=1):
        draw_scene(scene, image_size).save(out / _image_name(scene))
        if number % 1000 == 0 and number < total:
            progress(f"drew {number} of {total} pictures")
    text_only = [text_only_record(seed, i) for i in range(round(TEXT_ONLY_SHARE * train_scenes))]
    held = _held_out(held_out, held_out_scenes // 4)
    _write_json(out / "pretrain.json", [pretrain_record(scene) for scene in train])
    _write_json(out / "finetune.json", [finetune_record(scene) for scene in train] + text_only)
    _write_json(out / "held_out.json", held)
    counts = {
        "train_images": train_scenes,
        "held_out_images": held_out_scenes,
        "pretrain": train_scenes,
        "finetune": train_scenes + len(text_only),
        "text_only": len(text_only),
        "questions": len(held["questions"]),
    }
    progress(f"drew {total} pictures and wrote {len(held['questions'])} held-out questions")
    return counts

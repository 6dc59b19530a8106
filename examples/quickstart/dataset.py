"""Data set of the quickstart: drawn scenes with captions and conversations, in ShareGPT4V's JSON format.

`write_dataset` writes:

    images/train_000000.png ...
    pretrain.json    stage 1: one detailed caption per training scene
    finetune.json    stage 2: conversations about training scenes
    held_out.json    scenes and questions that training never sees

All files are pure functions of the seed and the numbers of scenes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.conversations import (
    caption,
    held_out_questions,
    scene_questions,
)
from examples.quickstart.scenes import COLORS, PLACES, SHAPES, Scene, draw_scene, make_scene, scene_rng
from megatron_share4v.files import read_text

IMAGE_SIZE = 72  # pixels, edge of every image
MAX_TURNS = 6  # question-answer pairs of one conversation
CAPTION_FRACTION = 0.1  # stage-2 records that ask for the detailed caption
TEXT_ONLY_FRACTION = 0.04  # stage-2 records without an image, per training scene
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
    """Build the stage-1 record of a scene: a request and the detailed caption."""
    rng = scene_rng(scene.seed, scene.split, scene.index, "pretrain")
    pairs = [(rng.choice(CAPTION_REQUESTS), caption(scene))]
    return {
        "id": f"pretrain_{scene.name}",
        "image": _image_name(scene),
        "conversations": _conversation(pairs, image=True),
    }


def finetune_record(scene: Scene) -> Record:
    """Build the stage-2 record of a scene: up to six questions and answers, or (one in ten) the detailed caption."""
    rng = scene_rng(scene.seed, scene.split, scene.index, "finetune")
    if rng.random() < CAPTION_FRACTION:
        pairs = [(rng.choice(CAPTION_REQUESTS), caption(scene))]
    else:
        pairs = [(q.text, q.answer) for q in scene_questions(scene, MAX_TURNS, rng)]
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
    """Build a stage-2 record without an image: two to four questions about words."""
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
    """A held-out question with its own image and another scene's image.

    `image` and `other_image` are relative to the data set's directory. The other scene is chosen independently of the
    answer.
    """

    image: str
    other_image: str
    kind: str
    question: str
    answer: str


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _held_out_content(scenes: list[Scene], per_kind: int) -> dict[str, Any]:
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
    """Read `held_out.json`: `[(scene, path of its image)]` and the questions.

    Raises OSError when the file cannot be read and ValueError when `write_dataset` did not write it.
    """
    text = read_text(Path(path))
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
    """Draw the whole data set into `out_dir`, which is created if missing.

    `image_size` is in pixels. `progress` receives one line of text per 1,000 images and one at the end. There are
    `held_out_scenes // 4` held-out questions of each of the six kinds, at most one of each kind per scene. Returns the
    counts `train_images`, `held_out_images`, `pretrain`, `finetune`, `text_only` and `questions`.

    Raises ValueError for fewer than 1 training or 64 held-out scenes (with fewer, the answers cannot be balanced) and
    OSError when a file cannot be written. An interrupted call can be repeated: files are overwritten, the JSON files
    last.
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
            progress(f"drew {number} of {total} images")
    text_only = [text_only_record(seed, i) for i in range(round(TEXT_ONLY_FRACTION * train_scenes))]
    held = _held_out_content(held_out, held_out_scenes // 4)
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
    progress(f"drew {total} images and wrote {len(held['questions'])} held-out questions")
    return counts

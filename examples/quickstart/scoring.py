"""Scores of the quickstart's model on held-out scenes: captions, and questions with the right and with a wrong image.

A model that uses the image answers well with the right image and near chance with another scene's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from examples.quickstart.conversations import answer_matches, caption_attribute_accuracy
from examples.quickstart.dataset import CAPTION_REQUESTS, HeldOutQuestion, load_held_out
from examples.quickstart.scenes import Scene
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.infer.session import Question, Session
from megatron_share4v.parallel.collectives import gather_objects

MAX_CAPTION_TOKENS, MAX_ANSWER_TOKENS, BATCH_SIZE = 160, 24, 32
SAMPLE_IMAGES = 6


@dataclass(frozen=True)
class HeldOutScores:
    """Accuracies (0 to 1) and the numbers of captions and questions that they are computed from."""

    captions: int
    caption_attribute_accuracy: float
    questions: int
    vqa_accuracy: float
    vqa_accuracy_image_swapped: float
    vqa_accuracy_by_kind: dict[str, float]


def load_questions(held_out: Path) -> list[Question]:
    """Read every question of `held_out` (held_out.json, images beside it) with its own image.

    Raises DataError when the file cannot be read.
    """
    _, questions = _load(held_out)
    return [_make_question(q.question, held_out.parent / q.image) for q in questions]


def score(session: Session, held_out: Path, *, captions: int, output: Path) -> HeldOutScores:
    """Caption `captions` scenes and answer all questions of `held_out`; write answers and sample images to `output`.

    `held_out` is held_out.json with the images beside it. DP ranks divide the questions; every rank returns the result.
    Raises DataError when `held_out` cannot be read.
    """
    scenes, questions = _load(held_out)
    directory = held_out.parent
    scenes = scenes[:captions]
    requests = [_make_question(CAPTION_REQUESTS[0], directory / image) for _, image in scenes]
    own = [_make_question(q.question, directory / q.image) for q in questions]
    other = [_make_question(q.question, directory / q.other_image) for q in questions]
    generated = _generate(session, requests, max_new_tokens=MAX_CAPTION_TOKENS, title="captions")
    answers = _generate(session, own, max_new_tokens=MAX_ANSWER_TOKENS, title="questions")
    swapped = _generate(session, other, max_new_tokens=MAX_ANSWER_TOKENS, title="questions, wrong image")
    if session.mesh.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        _write_answers(output / "answers.jsonl", questions, answers, swapped)
        _write_captions(output, [image for _, image in scenes], generated, directory)
    right = [answer_matches(text, question.answer) for text, question in zip(answers, questions)]
    right_swapped = [answer_matches(text, question.answer) for text, question in zip(swapped, questions)]
    by_kind: dict[str, list[bool]] = {}
    for is_right, question in zip(right, questions):
        by_kind.setdefault(question.kind, []).append(is_right)
    return HeldOutScores(
        captions=len(scenes),
        caption_attribute_accuracy=caption_attribute_accuracy([scene for scene, _ in scenes], generated),
        questions=len(questions),
        vqa_accuracy=_mean(right),
        vqa_accuracy_image_swapped=_mean(right_swapped),
        vqa_accuracy_by_kind={kind: _mean(by_kind[kind]) for kind in sorted(by_kind)},
    )


def captioned_image(path: Path, text: str, *, side: int = 320, margin: int = 12) -> Image.Image:
    """Enlarge the image at `path` to `side` pixels and write `text`, wrapped, below it."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) < 60:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    canvas = Image.new("RGB", (side + 2 * margin, side + 3 * margin + 14 * len(lines)), "white")
    with Image.open(path) as scene:
        canvas.paste(scene.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    ImageDraw.Draw(canvas).multiline_text((margin, side + 2 * margin), "\n".join(lines), fill="black", spacing=2)
    return canvas


def _load(held_out: Path) -> tuple[list[tuple[Scene, str]], list[HeldOutQuestion]]:
    try:
        return load_held_out(held_out)
    except (OSError, ValueError) as error:
        raise DataError(f"{held_out}: {error}; run examples/quickstart/run.sh again") from error


def _make_question(text: str, image: Path) -> Question:
    return Question(turns=(Turn("human", f"<image>\n{text}"),), image=image.read_bytes(), name=image.name)


def _mean(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)


def _generate(session: Session, questions: list[Question], *, max_new_tokens: int, title: str) -> list[str]:
    """Generate all answers, in order, on every rank. Collective over the DP ranks."""
    mesh = session.mesh
    own = range(mesh.coordinates.data, len(questions), mesh.layout.data)
    answers: dict[int, str] = {}
    for start in tqdm(range(0, len(own), BATCH_SIZE), desc=title, disable=mesh.rank != 0, unit="batch"):
        batch = own[start : start + BATCH_SIZE]
        texts = session.answer([questions[index] for index in batch], max_new_tokens=max_new_tokens)
        answers.update(zip(batch, texts))
    merged: dict[int, str] = {}
    for part in gather_objects(answers, group=mesh.dp_group):
        merged.update(part)
    return [merged[index] for index in range(len(questions))]


def _write_answers(path: Path, questions: list[HeldOutQuestion], answers: list[str], swapped: list[str]) -> None:
    rows = [
        asdict(question) | {"model": text, "model_swapped": other}
        for question, text, other in zip(questions, answers, swapped)
    ]
    _write_lines(path, rows)


def _write_captions(output: Path, images: list[str], captions: list[str], directory: Path) -> None:
    _write_lines(output / "captions.jsonl", [{"image": i, "caption": text} for i, text in zip(images, captions)])
    for number, (image, text) in enumerate(zip(images[:SAMPLE_IMAGES], captions)):
        captioned_image(directory / image, text).save(output / f"sample_{number}.png")


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

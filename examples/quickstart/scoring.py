"""Scores of the quickstart: captions and questions about held-out scenes, each question also with another scene's picture.

A model that looks answers well with the right picture and near chance with the wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from examples.quickstart.dataset import (
    CAPTION_REQUESTS,
    HeldOutQuestion,
    Scene,
    answer_matches,
    caption_attribute_accuracy,
    load_held_out,
)
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.infer.session import Question, Session
from megatron_share4v.parallel.collectives import gather_objects

CAPTION_TOKENS, ANSWER_TOKENS, BATCH = 160, 24, 32
SAMPLE_PICTURES = 6


@dataclass(frozen=True)
class HeldOutScores:
    """Shares between 0 and 1, with the counts that they are of."""

    captions: int
    caption_attribute_accuracy: float
    questions: int
    vqa_accuracy: float
    vqa_accuracy_image_swapped: float
    vqa_accuracy_by_kind: dict[str, float]


def held_out_questions(held_out: Path) -> list[Question]:
    """Every question of `held_out` (held_out.json, pictures beside it) with its own picture. Raises DataError when it is not readable."""
    _, questions = _load(held_out)
    return [_ask(q.question, held_out.parent / q.image) for q in questions]


def score(session: Session, held_out: Path, *, captions: int, output: Path) -> HeldOutScores:
    """Answer everything in `held_out` (held_out.json, pictures beside it), write answers.jsonl and sample pictures to `output`.

    Data-parallel ranks share the questions; every rank gets the result. Raises DataError when `held_out` is not readable.
    """
    scenes, questions = _load(held_out)
    folder = held_out.parent
    scenes = scenes[:captions]
    described = _answer(
        session,
        [_ask(CAPTION_REQUESTS[0], folder / image) for _, image in scenes],
        tokens=CAPTION_TOKENS,
        title="captions",
    )
    answered = _answer(
        session, [_ask(q.question, folder / q.image) for q in questions], tokens=ANSWER_TOKENS, title="questions"
    )
    swapped = _answer(
        session,
        [_ask(q.question, folder / q.other_image) for q in questions],
        tokens=ANSWER_TOKENS,
        title="questions, swapped",
    )
    right = [answer_matches(text, question.answer) for text, question in zip(answered, questions)]
    right_swapped = [answer_matches(text, question.answer) for text, question in zip(swapped, questions)]
    if session.mesh.rank == 0:
        rows = [
            asdict(q) | {"model": text, "model_swapped": other} for q, text, other in zip(questions, answered, swapped)
        ]
        _write(output, rows, scenes, described, folder)
    kinds = sorted({question.kind for question in questions})
    return HeldOutScores(
        captions=len(scenes),
        caption_attribute_accuracy=caption_attribute_accuracy([scene for scene, _ in scenes], described),
        questions=len(questions),
        vqa_accuracy=_share(right),
        vqa_accuracy_image_swapped=_share(right_swapped),
        vqa_accuracy_by_kind={
            kind: _share([ok for ok, question in zip(right, questions) if question.kind == kind]) for kind in kinds
        },
    )


def _load(held_out: Path) -> tuple[list[tuple[Scene, str]], list[HeldOutQuestion]]:
    try:
        return load_held_out(held_out)
    except (OSError, ValueError) as error:
        raise DataError(f"{held_out}: {error}; run examples/quickstart/run.sh again") from error


def _ask(text: str, picture: Path) -> Question:
    return Question(turns=(Turn("human", f"<image>\n{text}"),), image=picture.read_bytes(), name=picture.name)


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4)


def _answer(session: Session, questions: list[Question], *, tokens: int, title: str) -> list[str]:
    """All answers, in order, on every rank."""
    mesh = session.mesh
    mine = range(mesh.coordinates.data, len(questions), mesh.layout.data)
    answers: dict[int, str] = {}
    for start in tqdm(range(0, len(mine), BATCH), desc=title, disable=mesh.rank != 0, unit="batch"):
        numbers = mine[start : start + BATCH]
        answers.update(zip(numbers, session.answer([questions[number] for number in numbers], max_new_tokens=tokens)))
    parts = gather_objects(answers, group=mesh.dp_group)
    merged = {number: text for part in parts for number, text in part.items()}
    return [merged[number] for number in range(len(questions))]


def _write(output: Path, rows: list[dict], scenes: list[tuple[Scene, str]], captions: list[str], folder: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"image": image, "caption": text}) for (_, image), text in zip(scenes, captions)]
    (output / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    for number, ((_, image), text) in enumerate(list(zip(scenes, captions))[:SAMPLE_PICTURES]):
        captioned_picture(folder / image, text).save(output / f"sample_{number}.png")


def captioned_picture(path: Path, text: str, *, side: int = 320, margin: int = 12) -> Image.Image:
    """The scene at `path`, enlarged to `side` pixels, with `text` under it, wrapped."""
    words, lines = text.split(), [""]
    for word in words:
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 60 else [*lines, word]
    canvas = Image.new("RGB", (side + 2 * margin, side + 3 * margin + 14 * len(lines)), "white")
    with Image.open(path) as scene:
        canvas.paste(scene.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    ImageDraw.Draw(canvas).multiline_text((margin, side + 2 * margin), "\n".join(lines), fill="black", spacing=2)
    return canvas

"""Building blocks of the small benchmarks in tests: directives, pictures, JSON files and question rows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def encode_picture(number: int, kind: str = "JPEG") -> bytes:
    """Encode a small picture whose colour depends on `number`."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (40 * number % 256, 90, 10)).save(buffer, format=kind)
    return buffer.getvalue()


def write_pictures(root: Path, names: Iterable[str]) -> None:
    """Write one small picture for each name below `root`."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(number))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write `rows` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, content: object) -> None:
    """Write `content` as one JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def question_row(number: int | str, image: str, text: str, category: str = "default") -> dict:
    """Build a row of a question file in the format of the playground."""
    return {"question_id": number, "image": image, "text": text, "category": category}

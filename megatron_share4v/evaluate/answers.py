"""The official answer file: one JSON object per line with the official fields in their order; written atomically,
read for scoring.

One deviation: answer_id is derived from question and text where the scripts draw a random shortuuid, so that identical
runs give identical files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_share4v.evaluate.benchmark_files import read_jsonl
from megatron_share4v.evaluate.pairing import AnswerPairing
from megatron_share4v.evaluate.records import Answer, Doc
from megatron_share4v.files import atomic_write

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22


def answer_id(item_id: str, text: str) -> str:
    """Derive a stable id in the form of a shortuuid: 22 characters of its alphabet."""
    number = int.from_bytes(hashlib.sha256(f"{item_id}\0{text}".encode("utf-8", "surrogatepass")).digest(), "big")
    letters = []
    for _ in range(_ID_LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)


def answer_row(item: Doc, answer: Answer, model: str) -> dict[str, Any]:
    """Row of the answer file in the format of model_vqa*.py."""
    head = {"question_id": item.question_id, "prompt": answer.prompt, "text": answer.text}
    return head | {"answer_id": answer_id(item.id, answer.text), "model_id": model, "metadata": {}}


def make_answer(item: Doc, text: str) -> Answer:
    """Build the prediction for a question; `text` is already cleaned by Decoding.clean."""
    return Answer(item.id, item.prompt if item.recorded is None else item.recorded, text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines atomically: the old file is replaced when the new one is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=True) as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read_answers(path: Path, items: Sequence[Doc], *, skipped: Collection[str] = ()) -> list[Answer]:
    """Read an answer file of this or of the official tools, in file order.

    Rows are paired with the questions by question_id, prompt and picture, those of Q-Bench by picture and question (see
    pairing.py). skipped: ids that the benchmark leaves out of its question file. Raises DataError for other rows that
    answer no question or one that is answered already, with their numbers.
    """
    pairing = AnswerPairing(items, skipped=skipped)
    return [make_answer(item, text) for item, text in pairing.pair(list(read_jsonl(path)))]

"""The official answer file: one JSON object a line, with the official fields in their order; written whole, and read again to be scored.

One deviation: answer_id is derived from question and text where the scripts draw a random shortuuid, so that identical runs give identical files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import pick, read_jsonl
from megatron_share4v.evaluate.records import Answer, Item

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22


def answer_id(item_id: str, text: str) -> str:
    """Looks like a shortuuid: 22 characters of its alphabet."""
    number = int.from_bytes(hashlib.sha256(f"{item_id}\0{text}".encode("utf-8", "surrogatepass")).digest(), "big")
    letters = []
    for _ in range(_ID_LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)


def answer_row(item: Item, answer: Answer, model: str) -> dict[str, Any]:
    """The row of model_vqa*.py."""
    head = {"question_id": item.question_id, "prompt": answer.prompt, "text": answer.text}
    return head | {"answer_id": answer_id(item.id, answer.text), "model_id": model, "metadata": {}}


def make_answer(item: Item, text: str) -> Answer:
    """`text` is clean already: Decoding.clean."""
    return Answer(item.id, item.prompt if item.recorded is None else item.recorded, text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The whole file or none: it is replaced when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_answers(path: Path, items: Sequence[Item]) -> list[Answer]:
    """The answers of a file of this or of the official tools, to `items`, in its order; the k-th row of a question_id belongs to its k-th item.

    Rows of Q-Bench are in the order of the items: they have no id. Raises DataError for rows of other questions.
    """
    waiting: dict[object, deque[Item]] = defaultdict(deque)
    for item in items:
        waiting[item.question_id].append(item)
    answers = []
    for number, (where, row) in enumerate(read_jsonl(path)):
        is_numbered = "question_id" not in row and "response" in row
        key = number if is_numbered else pick(row, "question_id", (int, str), where=where)
        if not waiting.get(key):
            raise DataError(
                f"{where}: answers question {key!r}, which is not asked, or has its answer already; is it another benchmark's or split's?"
            )
        answers.append(
            make_answer(waiting[key].popleft(), pick(row, "response" if is_numbered else "text", str, where=where))
        )
    return answers

"""Pairing of the rows of an answer file with the questions of a benchmark: by question id, question text and picture.

The order of the rows decides only between questions that are equal in all three.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import Row, get_field
from megatron_share4v.evaluate.directives import question_text
from megatron_share4v.evaluate.records import Doc

_REASONS = {
    "unknown": "name no question of this benchmark and split",
    "other text": "have the id of a question with another text",
    "other picture": "have the id of a question about another picture",
    "repeated": "answer a question that is answered already",
    "ambiguous": "have an id that several questions share, and nothing that tells which of them is meant",
}
"""Reasons why a row is refused, as they continue "N of M rows ..."."""


class _Refused(Exception):
    """A row that answers no question. reason: a key of _REASONS; detail: what the message adds for the first row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class AnswerPairing:
    """Questions of a benchmark by id, waiting for the rows of one answer file."""

    def __init__(self, items: Sequence[Doc], *, skipped: Collection[str] = ()) -> None:
        """skipped: ids of the question file that the benchmark leaves out; rows that answer them are passed over."""
        self._items, self._skipped = items, frozenset(skipped)
        self._by_key: dict[object, list[Doc]] = defaultdict(list)
        for item in items:
            self._by_key[str(item.question_id)].append(item)
            if "img_path" in item.meta:  # rows of Q-Bench have no id
                self._by_key[_qbench_key(item.meta)].append(item)

    def pair(self, rows: Sequence[tuple[str, Row]]) -> list[tuple[Doc, str]]:
        """Return (question, text) for each (file:line, row), in the order of the rows.

        Raises DataError with the number of rows for each reason when some answer no question.
        """
        pairs: list[tuple[Doc, str]] = []
        taken: dict[str, str] = {}
        refused: Counter[str] = Counter()
        first: dict[str, str] = {}
        rows = [(where, row) for where, row in rows if str(row.get("question_id")) not in self._skipped]
        prompts = Counter(_prompt_key(row) for _, row in rows)
        for where, row in rows:
            text = get_field(row, "text" if _has_id(row) else "response", str, where=where)
            try:
                item = self._find(row, taken, alike=prompts[_prompt_key(row)], where=where)
            except _Refused as error:
                refused[error.reason] += 1
                first.setdefault(error.reason, f"{where}: {error}")
                continue
            taken[item.id] = where
            pairs.append((item, text))
        if refused:
            raise DataError(self._message(first, refused, rows=len(rows)))
        return pairs

    def _message(self, first: Mapping[str, str], refused: Mapping[str, int], *, rows: int) -> str:
        parts = [f"{first[reason]}. {refused[reason]} of {rows} rows {_REASONS[reason]}" for reason in refused]
        return (
            f"{'; '.join(parts)}. The benchmark has {len(self._items)} questions; check --benchmark, --split and the "
            "release of its question file"
        )

    def _find(self, row: Row, taken: Mapping[str, str], *, alike: int, where: str) -> Doc:
        """Return the question of a row. Raises _Refused, and DataError for a row without an id.

        taken: where each answered question is answered. alike: number of rows with this id and prompt.
        """
        key: object
        if _has_id(row):
            given = get_field(row, "question_id", (int, str), where=where)
            key, shown = str(given), f"question {given!r}"
        else:
            key, given = _qbench_key(row), None
            shown = f"question {row.get('question')!r} about {row.get('img_path')!r}"
        known = self._by_key.get(key)
        if not known:
            raise _Refused("unknown", f"{shown} is not in this benchmark")
        chosen = _with_picture(_with_text(known, row, shown), row, shown)
        chosen = [item for item in chosen if type(item.question_id) is type(given)] or chosen
        same = len(chosen) == 1 or len({(question_text(item.prompt), item.image) for item in chosen}) == 1
        if not same and (not isinstance(row.get("prompt"), str) or alike != len(chosen)):
            raise _Refused("ambiguous", f"{shown} names {len(chosen)} questions")
        free = [item for item in chosen if item.id not in taken]
        if not free:
            raise _Refused("repeated", f"{shown} is answered already, first at {taken[chosen[0].id]}")
        return free[0]


def _has_id(row: Row) -> bool:
    return "question_id" in row or "img_path" not in row


def _prompt_key(row: Row) -> tuple[str, str]:
    return str(row.get("question_id")), question_text(str(row.get("prompt")))


def _with_text(known: Sequence[Doc], row: Row, shown: str) -> Sequence[Doc]:
    """Return the questions whose text the prompt of `row` has; all of them for a row without a prompt."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return known
    text = question_text(prompt)
    equal = [item for item in known if question_text(item.prompt) == text]
    # Older official files wrap the question into other words.
    chosen = equal or [item for item in known if (own := question_text(item.prompt)) and own in text]
    if not chosen:
        raise _Refused("other text", f"{shown} is {_shorten(known[0].prompt)}, and the row has {_shorten(prompt)}")
    return chosen


def _with_picture(known: Sequence[Doc], row: Row, shown: str) -> Sequence[Doc]:
    """Return the questions about the picture that `row` names; all of them where either names none."""
    given = row.get("image")
    if not isinstance(given, str):
        return known
    names = [item.image.name if isinstance(item.image, Path) else None for item in known]
    chosen = [item for item, name in zip(known, names) if name in (None, PurePosixPath(given).name)]
    if not chosen:
        raise _Refused("other picture", f"{shown} is about {names[0]}, and the row about {given!r}")
    return chosen


def _qbench_key(row: Mapping[str, Any]) -> tuple[str, str]:
    return PurePosixPath(str(row.get("img_path"))).name, question_text(str(row.get("question")))


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")

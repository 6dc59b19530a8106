"""MMBench in English and Chinese: TSV with embedded images, xlsx for the server, and a local score without a judge.

Cells are read as pandas.read_table does for the official tool: quotes hold tabs and line breaks, and certain words mean
"nothing".
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.evaluate.answers import answer_row
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile
from megatron_share4v.evaluate.directives import LETTER, LETTER_CN
from megatron_share4v.evaluate.metrics import mmbench
from megatron_share4v.evaluate.metrics.profile import Profile
from megatron_share4v.evaluate.records import Answer, Doc
from megatron_share4v.evaluate.task import MMBENCH, MetricValues, PredictionTexts, Task

OPEN_ROWS = "rows that a judge would read"
_LETTERS = "ABCD"
_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
_PLACE = 6  # of the column `prediction`
# pandas' own list.
_NOTHING = frozenset(
    [
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)
_LONGEST_CELL = 1 << 27
_INDEX = re.compile(r"[0-9]{1,64}")  # the official toolkit takes longer cells as images too


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield (file and row, cells) with None for an empty cell."""
    csv.field_size_limit(_LONGEST_CELL)  # an image is one cell
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                yield (
                    f"{path}, row {row.get('index')}",
                    {key: None if value in _NOTHING else value for key, value in row.items() if key is not None},
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


def _absent(value: str | None) -> bool:
    return value is None or value.lower() in ("nan", "none")


def _options(row: Mapping[str, str | None]) -> list[str]:
    """Option texts up to the first missing one."""
    present = []
    for letter in _LETTERS:
        value = row.get(letter)
        if value is None or _absent(value):
            break
        present.append(value)
    return present


class _Pictures:
    """Pictures of a file by the index of their row; newer files write the index of another row for a repeated one."""

    def __init__(self, rows: Sequence[tuple[str, Mapping[str, str | None]]]) -> None:
        self._cells = {row["index"]: (where, row["image"] or "") for where, row in rows}
        self._decoded: dict[str | None, bytes] = {}

    def __getitem__(self, index: str) -> bytes:
        """Return the picture of a row; rows with the same picture share its bytes. Raises DataError."""
        path, owner = [], index
        while _INDEX.fullmatch(cell := self._cells[owner][1]):
            path.append(owner)
            if cell in path or cell not in self._cells:
                named = f"its image is the one of row {self._cells[index][1]}"
                end = "the rows refer to each other in a circle" if cell in path else f"there is no row {cell}"
                raise DataError(f"{self._cells[index][0]}: {named}, and {end}; fetch the file again")
            owner = cell
        if owner not in self._decoded:
            try:
                self._decoded[owner] = base64.b64decode(cell, validate=True)
            except ValueError as error:
                where = self._cells[owner][0]
                raise DataError(f"{where}: its image is no base64 ({error}); fetch the file again") from error
        return self._decoded[owner]


def _check_cells(where: str, row: Mapping[str, str | None]) -> None:
    missing = [name for name in ("index", "question", "image") if row.get(name) is None]
    if missing or not _INDEX.fullmatch(row["index"] or ""):
        raise DataError(
            f"{where}: has no {', '.join(missing) or 'number in index'}; the file is damaged, or another than MMBench's"
        )


def _item(row: Mapping[str, str | None], *, image: bytes, ending: str) -> Doc:
    index, question, hint = row["index"] or "", row["question"] or "", row.get("hint")
    text = "" if _absent(hint) else f"{hint}\n"
    text += question + "".join(f"\n{letter}. {option}" for letter, option in zip(_LETTERS, _options(row)))
    # The answer file's prompt lacks the directive.
    return Doc(
        id=index,
        question_id=int(index),
        prompt=text + ending,
        recorded=text,
        image=image,
        meta={**row, "image": None},
    )


def _reader(ending: str):
    def read(folder: BenchmarkFolder) -> Iterator[Doc]:
        rows = list(_rows(folder["questions"]))
        for where, row in rows:
            _check_cells(where, row)
        pictures = _Pictures(rows)
        for _, row in rows:
            yield _item(row, image=pictures[row["index"] or ""], ending=ending)

    return read


def _answer_row(item: Doc, answer: Answer, model: str) -> dict[str, Any]:
    row = answer_row(item, answer, model)
    # One round: the file itself holds the rotations of each question, as rows with index + n * 1,000,000.
    own = {"round_id": 0, "options": _options(item.meta), "option_char": list(_LETTERS[: len(_options(item.meta))])}
    order = ("question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata")
    return {name: (row | own)[name] for name in order}


def _measure(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile) -> MetricValues:
    rows = []
    for item in items:
        choices = {letter: item.meta[letter] for letter in _LETTERS if item.meta.get(letter) is not None}
        kinds = {
            name: item.meta.get(column) or ""
            for name, column in (("category", "category"), ("l2_category", "l2-category"))
        }
        rows.append(
            mmbench.MmbenchRow(
                int(item.question_id), item.meta.get("answer") or "", texts.get(item.id, ""), choices, **kinds
            )
        )
    found = mmbench.score(rows)
    values = {"accuracy": found.headline, OPEN_ROWS: float(len(found.open_rows))}
    return values | {name: 100 * value for name, value in {**found.by_l2, **found.by_category}.items()}


def _submit(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> Mapping[str, bytes]:
    return {
        f"mmbench_{folder.split}.xlsx": _workbook([item.meta for item in items], [texts.get(item.id) for item in items])
    }


def _workbook(rows: Sequence[Mapping[str, str | None]], predictions: Sequence[str | None]) -> bytes:
    """Build the xlsx file for the server. Raises ConfigError when openpyxl is missing."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise ConfigError(
            'MMBench\'s server takes an xlsx file, and openpyxl is not installed; pip install -e ".[evaluate]"'
        ) from error
    names = [name for name in rows[0] if name not in _LEFT_OUT]
    names.insert(_PLACE, "prediction")
    book = Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    sheet.append(names)
    for number, (row, prediction) in enumerate(zip(rows, predictions), 2):
        for place, name in enumerate(names, 1):
            value = prediction if name == "prediction" else row[name]
            if value is not None:
                cell = sheet.cell(
                    number, place, int(value) if name == "index" else ILLEGAL_CHARACTERS_RE.sub("", value)
                )
                cell.data_type = "n" if name == "index" else "s"  # "=..." is no formula
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def _task(name: str, title: str, splits: tuple[str, str], ending: str) -> Task:
    return Task(
        name=name,
        title=title,
        folder="mmbench",
        official=MMBENCH,
        headline="accuracy",
        splits=splits,
        scored=splits[:1],
        needs=(
            RequiredFile(
                "questions",
                ("mmbench_{split}.tsv",),
                f"https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_{splits[0]}.tsv",
            ),
        ),
        read=_reader(ending),
        row=_answer_row,
        measure=_measure,
        submit=_submit,
        server="https://mmbench.opencompass.org.cn/mmbench-submission",
    )


TASKS = (
    _task("mmbench", "MMBench", ("dev_20230712", "test_20230712"), LETTER),
    _task("mmbench_cn", "MMBench-CN", ("dev_cn_20231003", "test_cn_20231003"), LETTER_CN),
)

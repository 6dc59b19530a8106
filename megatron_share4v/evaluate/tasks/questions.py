"""Question files in LLaVA's JSONL format, which most benchmarks share, and where the published ones come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile, Row, read_jsonl, require
from megatron_share4v.evaluate.directives import question_text
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.task import item_ids
from megatron_share4v.logging import get_logger

PLAYGROUND = (
    "playground.zip of ShareGPT4V (https://drive.google.com/file/d/1tdbFb1Q4WXvBzab2o0B6sVvDJY0lQGUp) "
    "or eval.zip of LLaVA (https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy)"
)
COCO = "http://images.cocodataset.org/zips/"


def both(name: str) -> tuple[str, str]:
    """Names of a playground file in the releases of ShareGPT4V and LLaVA."""
    return f"share4v_{name}", f"llava_{name}"


def playground(key: str, *names: str, splits: tuple[str, ...] = ()) -> RequiredFile:
    """Required file of the evaluation playground."""
    return RequiredFile(key, names, PLAYGROUND, splits)


def read_questions(folder: BenchmarkFolder, *, ending: str = "") -> Iterator[tuple[str, Row]]:
    """Yield (file:line, row) of the JSONL `questions`, each with question_id, image and text.

    ending: required end of the first text. Official texts include the directive; a file without it would give a
    meaningless score.
    """
    for number, (where, row) in enumerate(read_jsonl(folder["questions"])):
        require(row, where=where, question_id=(int, str), image=str, text=str)
        if not number and not row["text"].endswith(ending):
            raise DataError(
                f"{where}: the text is {row['text'][-80:]!r} and does not end with {ending!r}; take the official file\n"
                f"{folder.layout}"
            )
        yield where, row


def make_docs(
    folder: BenchmarkFolder, rows: Iterable[tuple[str, Row]], meta: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Doc]:
    """Yield a question per row. meta: by unique id; the row itself when not given."""
    contents = [row for _, row in rows]
    for name, row in zip(item_ids(row["question_id"] for row in contents), contents):
        image = folder.image(row["image"])
        yield Doc(
            id=name,
            question_id=row["question_id"],
            prompt=row["text"],
            image=image,
            meta=row if meta is None else meta[name],
        )


def warn_of_differences(what: str, pairs: Iterable[tuple[str, str, str]]) -> None:
    """Log one warning for all (where, text, other text) whose questions differ: the ids agree and the files may not."""
    different = [(where, one, other) for where, one, other in pairs if question_text(one) != question_text(other)]
    if different:
        where, one, other = different[0]
        get_logger().warning(
            "%s: %d questions differ from those with the same id, the first at %s: %r and %r; check that all files are "
            "of one release",
            what,
            len(different),
            where,
            one[:80],
            other[:80],
        )

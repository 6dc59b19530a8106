"""Published scores beside measured ones, as a Markdown table and as a chart.

Scores measured differently from the paper get a row of their own that names the difference.
Sources: ShareGPT4V (arXiv 2311.12793) and its model zoo; LLaVA-1.5 (arXiv 2310.03744).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import get_field, read_json
from megatron_share4v.evaluate.metrics.profile import OFFICIAL
from megatron_share4v.evaluate.tasks import TASKS, get_task
from megatron_share4v.evaluate.tasks.mmbench import OPEN_ROWS
from megatron_share4v.observability.charts import Series, bar_chart, save_png

COLUMNS = (
    "LLaVA-W", "MME-P", "MME-C", "MMB", "MMB-CN", "SEED-I", "MM-Vet", "QBench", "SQA-I",
    "VQAv2", "VizWiz", "GQA", "TextVQA", "POPE",
)  # fmt: skip
CUSTOM = "custom"
_REMEDY = "Give a result.json that tools/evaluate.py wrote"
_COLUMN_OF = {  # benchmark and score: column
    ("llava_bench", "all"): "LLaVA-W",
    ("mme", "perception"): "MME-P",
    ("mme", "cognition"): "MME-C",
    ("mmbench", "accuracy"): "MMB",
    ("mmbench_cn", "accuracy"): "MMB-CN",
    ("seed", "image accuracy"): "SEED-I",
    ("mm_vet", "total"): "MM-Vet",
    ("qbench", "accuracy"): "QBench",
    ("science_qa", "image accuracy"): "SQA-I",
    ("vqav2", "accuracy"): "VQAv2",
    ("vizwiz", "accuracy"): "VizWiz",
    ("gqa", "accuracy"): "GQA",
    ("textvqa", "accuracy"): "TextVQA",
    ("pope", "f1"): "POPE",
}


@dataclass(frozen=True)
class ScoreRow:
    """Table row: a model and its scores by column.

    differs: why they are not comparable with the paper; empty if they are.
    """

    name: str
    scores: Mapping[str, float]
    differs: str = ""

    @property
    def title(self) -> str:
        """Model name, with the difference in parentheses."""
        return f"{self.name} ({self.differs})" if self.differs else self.name


def _published_row(name: str, *values: float | None) -> ScoreRow:
    return ScoreRow(name, {column: value for column, value in zip(COLUMNS, values) if value is not None})


# LLaVA-1.5's published SEED scores (58.6, 61.6) include videos and are omitted. MME-C and Q-Bench of the 13B model were
# measured by third parties.
PUBLISHED = (
    _published_row("ShareGPT4V-7B", 72.6, 1567.4, 376.4, 68.8, 62.2, 69.7, 37.6, 63.4, 68.4, 80.6, 57.2, 63.3, 60.4),
    _published_row("ShareGPT4V-13B", 79.9, 1618.7, 303.2, 68.5, 63.7, 70.8, 43.1, 65.2, 71.2, 81.0, 55.6, 64.8, 62.2),
    _published_row(
        "LLaVA-1.5-7B", 65.4, 1510.7, None, 64.3, 58.3, None, 31.1, None, 66.8, 78.5, 50.0, 62.0, 58.2, 85.9
    ),
    _published_row(
        "LLaVA-1.5-13B", 72.5, 1531.3, 295.4, 67.7, 63.6, None, 36.1, 62.1, 71.6, 80.0, 53.6, 63.3, 61.3, 85.9
    ),
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Content of a result.json.

    data: folder of the benchmark files. judge: the judge model, None without one. complete: all questions were
    evaluated.
    """

    model: str
    benchmark: str
    split: str
    profile: str
    scores: Mapping[str, float | None]
    data: str = ""
    judge: str | None = None
    complete: bool = True

    def column(self, score: str) -> str | None:
        """Column of a score in the table; None for one that is not shown. Custom questions have one for each folder."""
        if self.benchmark == CUSTOM:
            name = Path(self.data).name
            return (f"{CUSTOM}: {name}" if name else CUSTOM) if score == get_task(CUSTOM).headline else None
        return _COLUMN_OF.get((self.benchmark, score))

    @classmethod
    def read(cls, path: Path) -> BenchmarkResult:
        """Read a result.json. Raises DataError for other content."""
        content = read_json(path, dict)
        fields = {
            key: get_field(content, key, str, where=str(path), remedy=_REMEDY)
            for key in ("model", "benchmark", "split", "profile")
        }
        if fields["benchmark"] not in TASKS:
            raise DataError(f"{path}: 'benchmark' is {fields['benchmark']!r}, which does not exist here. {_REMEDY}")
        scores = get_field(content, "scores", dict, where=str(path), remedy=_REMEDY)
        for name, value in scores.items():
            if value is not None:
                get_field(scores, name, (int, float), where=f"{path}, scores", remedy=_REMEDY)
        judge = content.get("judge")
        named = get_field(judge, "model", str, where=f"{path}, judge", remedy=_REMEDY) if judge else None
        data = str(content.get("data", ""))
        return cls(**fields, scores=scores, data=data, judge=named, complete=content.get("complete", True))

    @property
    def differs(self) -> str:
        """Reasons why the scores are not comparable with the paper; empty if they are."""
        task = get_task(self.benchmark)
        reasons = [f"profile {self.profile}"] if self.profile != OFFICIAL.value else []
        if task.judged and self.judge != task.judged.official:
            reasons.append(f"judge {self.judge}")
        if self.split != task.splits[0]:
            reasons.append(f"split {self.split}")
        if self.scores.get(OPEN_ROWS):
            reasons.append("no judge for texts without a letter")  # the server uses a judge, so its score is higher
        if not self.complete:
            reasons.append("part of the questions")
        return ", ".join(reasons)


def group_results(measured: Sequence[BenchmarkResult]) -> list[ScoreRow]:
    """Group results into one row per model and difference, comparable rows first."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for each in measured:
        for name, value in each.scores.items():
            column = each.column(name)
            if column and value is not None and math.isfinite(value):
                found.setdefault((each.model, each.differs), {})[column] = value
    return [
        ScoreRow(model, scores, differs)
        for (model, differs), scores in sorted(found.items(), key=lambda item: bool(item[0][1]))
    ]


def _columns(rows: Sequence[ScoreRow]) -> list[str]:
    """Columns of the table: the published ones, then those of custom questions in `rows`."""
    custom = dict.fromkeys(column for line in rows for column in line.scores if column not in COLUMNS)
    return [*COLUMNS, *custom]


def table(measured: Sequence[BenchmarkResult]) -> str:
    """Markdown table: published rows, then measured ones; columns with only published scores are kept."""
    results = group_results(measured)
    columns = _columns(results)
    rows = [["model", *(column.replace("|", "/") for column in columns)], ["---", *["---:"] * len(columns)]]
    for line in (*PUBLISHED, *results):
        rows.append(
            [
                line.title.replace("|", "/"),
                *(f"{line.scores[column]:.1f}" if column in line.scores else "-" for column in columns),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def save_chart(path: Path, measured: Sequence[BenchmarkResult]) -> None:
    """Write a PNG of the columns in `measured` with the published rows that have them; rows that are not comparable are
    hatched.
    """
    results = group_results(measured)
    columns = [column for column in _columns(results) if any(column in line.scores for line in results)]
    published = [line for line in PUBLISHED if any(column in line.scores for column in columns)]
    series = [
        Series(line.title, [line.scores.get(column) for column in columns], bool(line.differs))
        for line in (*published, *results)
    ]
    title = "Published and measured scores; hatched: not comparable with the paper"
    save_png(bar_chart(title, columns, series), path)

"""Table and chart of scores: published rows, measured rows, and separate rows for incomparable scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate import published
from megatron_share4v.evaluate.published import COLUMNS, PUBLISHED, BenchmarkResult, group_results, save_chart, table
from megatron_share4v.evaluate.tasks import TASKS
from megatron_share4v.observability.charts import Series, bar_chart


def measured(benchmark: str, scores: dict, **more: object) -> BenchmarkResult:
    given = {"model": "actual", "split": TASKS[benchmark].splits[0], "profile": "official", **more}
    return BenchmarkResult(benchmark=benchmark, scores=scores, **given)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|\n").split("|")]


def test_published_rows() -> None:
    rows = table([]).splitlines()
    assert cells(rows[0]) == ["model", *COLUMNS] and len(rows) == 6
    expected = [
        "ShareGPT4V-7B 72.6 1567.4 376.4 68.8 62.2 69.7 37.6 63.4 68.4 80.6 57.2 63.3 60.4 -",
        "ShareGPT4V-13B 79.9 1618.7 303.2 68.5 63.7 70.8 43.1 65.2 71.2 81.0 55.6 64.8 62.2 -",
        "LLaVA-1.5-7B 65.4 1510.7 - 64.3 58.3 - 31.1 - 66.8 78.5 50.0 62.0 58.2 85.9",
        "LLaVA-1.5-13B 72.5 1531.3 295.4 67.7 63.6 - 36.1 62.1 71.6 80.0 53.6 63.3 61.3 85.9",
    ]
    assert [cells(row) for row in rows[2:]] == [row.split() for row in expected]


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.name != "custom"], ids=lambda task: task.name)
def test_every_headline_has_a_column(task) -> None:
    judge = task.judged.official if task.judged else None
    [line] = group_results([measured(task.name, {task.headline: 50.0}, judge=judge)])
    assert list(line.scores.values()) == [50.0] and set(line.scores) <= set(COLUMNS) and not line.differs
    assert task.name == "pope" or set(line.scores) <= set(PUBLISHED[0].scores)


def test_both_numbers_of_mme_share_a_row_with_the_others() -> None:
    [line] = group_results(
        [
            measured("mme", {"perception": 1500.0, "cognition": 300.0, "count": 100.0}),
            measured("gqa", {"accuracy": 63.0}),
        ]
    )
    assert line.scores == {"MME-P": 1500.0, "MME-C": 300.0, "GQA": 63.0}
    assert "| actual | - | 1500.0 | 300.0 | -" in table([measured("mme", {"perception": 1500.0, "cognition": 300.0})])


OTHER_KINDS = [
    (measured("gqa", {"accuracy": 63.0}, profile="corrected"), "profile corrected"),
    (measured("llava_bench", {"all": 80.0}, judge="gpt-4o"), "judge gpt-4o"),
    (measured("mm_vet", {"total": 40.0}, judge="gpt-4-0314"), "judge gpt-4-0314"),
    (measured("vqav2", {"accuracy": 79.0}, split="val2014"), "split val2014"),
    (
        measured("mmbench", {"accuracy": 60.0, "rows that a judge would read": 3.0}),
        "no judge for texts without a letter",
    ),
    (measured("pope", {"f1": 85.0}, complete=False), "part of the questions"),
    (measured("mm_vet", {"total": 40.0}, judge="x", profile="corrected"), "profile corrected, judge x"),
]


@pytest.mark.parametrize(("other", "why"), OTHER_KINDS, ids=lambda part: part if isinstance(part, str) else "")
def test_other_kinds_of_numbers_never_stand_under_the_models_name_alone(other: BenchmarkResult, why: str) -> None:
    fair = measured("seed", {"image accuracy": 69.0})
    first, second = group_results([other, fair])
    assert (first.title, first.scores) == ("actual", {"SEED-I": 69.0})
    assert second.title == f"actual ({why})" and len(second.scores) == 1
    rows = [cells(row) for row in table([other, fair]).splitlines()[2:]]
    assert [row[0] for row in rows] == [line.name for line in PUBLISHED] + ["actual", f"actual ({why})"]


def test_custom_questions_have_a_column_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each folder of questions, beside the published columns, in table and chart."""
    birds = measured("custom", {"accuracy": 75.0}, data="/questions/birds")
    scans = measured("custom", {"accuracy": 50.0}, data="/questions/scans")
    earlier = measured("custom", {"accuracy": 25.0}, model="old")
    rows = [cells(row) for row in table([birds, scans, earlier, measured("gqa", {"accuracy": 63.0})]).splitlines()]
    assert rows[0] == ["model", *COLUMNS, "custom: birds", "custom: scans", "custom"]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[-2][0] == "actual" and rows[-2][-3:] == ["75.0", "50.0", "-"] and "63.0" in rows[-2]
    assert rows[-1][0] == "old" and rows[-1][-3:] == ["-", "-", "25.0"]
    drawn = []
    monkeypatch.setattr(published, "bar_chart", lambda title, columns, series: drawn.append((columns, series)))
    monkeypatch.setattr(published, "save_png", lambda figure, path: None)
    save_chart(tmp_path / "chart.png", [birds])
    assert drawn == [(["custom: birds"], [Series("actual", [75.0])])]


def test_missing_and_nan_scores_are_omitted() -> None:
    assert group_results([measured("mme", {"perception": None, "cognition": float("nan")})]) == []


def test_results_are_read_from_their_files(tmp_path: Path) -> None:
    content = {
        "model": "m",
        "benchmark": "mm_vet",
        "split": "",
        "profile": "official",
        "scores": {"total": 31.0},
        "judge": {"model": "gpt-4-0613"},
    }
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert BenchmarkResult.read(tmp_path / "result.json") == measured(
        "mm_vet", {"total": 31.0}, model="m", judge="gpt-4-0613"
    )
    for other, words in (
        ({"profile": None}, "result.json: 'profile' is 'None'"),
        ({"benchmark": "nope"}, "result.json: 'benchmark' is 'nope', which does not exist here"),
        ({"scores": {"total": "31"}}, "result.json, scores: 'total' is '31'; expected"),
        ({"judge": "gpt"}, "result.json, judge: 'model' is 'None'"),
    ):
        (tmp_path / "result.json").write_text(json.dumps({**content, **other}))
        with pytest.raises(DataError, match=f"{words}.*Give a result.json"):
            BenchmarkResult.read(tmp_path / "result.json")


def test_chart_has_longer_bars_for_larger_numbers(tmp_path: Path) -> None:
    figure = bar_chart(
        "t",
        ["a", "none"],
        [Series("x", [10.0, None]), Series("y", [20.0, None]), Series("z", [20.0, None], hatched=True)],
    )
    [axes], [legend] = figure.axes, figure.legends
    assert [bar.get_width() for bar in axes.patches] == [10.0, 20.0, 20.0] and axes.get_ylabel() == "a"
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, False, True]
    assert [text.get_text() for text in legend.get_texts()] == ["x", "y", "z"]
    save_chart(
        tmp_path / "sub/chart.png",
        [measured("gqa", {"accuracy": 63.0}), measured("gqa", {"accuracy": 64.0}, profile="corrected")],
    )
    with Image.open(tmp_path / "sub/chart.png") as chart:
        assert chart.format == "PNG" and chart.width > 400

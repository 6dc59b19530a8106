"""Submission files of each benchmark in the formats of the official servers and scorers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from official_files import WRITERS

from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.evaluate.answers import make_answer
from megatron_share4v.evaluate.tasks import get_task


def submission(name: str, split: str | None, root: Path, texts: list[str]) -> dict[str, bytes]:
    WRITERS[name, split](root)
    task = get_task(name)
    folder = task.open(root, split)
    items = task.items(folder)
    return dict(task.submission(folder, items, [make_answer(item, text) for item, text in zip(items, texts)]))


def test_vqav2_submission_has_every_question_of_test2015(tmp_path: Path) -> None:
    [(name, content)] = submission(
        "vqav2", None, tmp_path, ["Red.", "Yes, it is", "two", "An umbrella", "at Joe's"]
    ).items()
    texts = {
        999: "",
        1000: "red",
        1001: "yes it is",
        1002: "2",
        1003: "umbrella",
        1004: "at joe 's",
        1005: "",
    }  # the last was not answered
    assert name == "vqav2_test2015.json" and json.loads(content) == [
        {"question_id": k, "answer": text} for k, text in texts.items()
    ]


def test_gqa_submission(tmp_path: Path) -> None:
    [content] = submission("gqa", None, tmp_path, ["No..", "Women"]).values()
    assert (
        content
        == b'[{"questionId": "201307251", "prediction": "no"}, {"questionId": "201640614", "prediction": "women"}]'
    )


def test_vizwiz_submission_wants_every_answer(tmp_path: Path) -> None:
    [content] = submission("vizwiz", None, tmp_path, ["A dog", "Unanswerable", "two", "x", "y"]).values()
    assert (
        json.loads(content)[0] == {"image": "VizWiz_test_00000000.jpg", "answer": "dog"}
        and len(json.loads(content)) == 5
    )
    with pytest.raises(DataError, match="no answer to 1 of 5 questions, the first is 4"):
        submission("vizwiz", None, tmp_path, ["a"] * 4)


def test_mme_files_are_those_of_the_official_tool(tmp_path: Path) -> None:
    files = submission("mme", None, tmp_path, ["Yes", "No", "Yes", "No", "Yes", "Maybe"])
    assert files["posters.txt"].decode().splitlines() == [
        "tt0116209.txt\tIs this movie titled moonstruck (1987)? Please answer yes or no.\tYes\tYes",
        "tt0116209.txt\tIs this movie directed by jing wong?  Please answer yes or no.\tNo\tNo",
    ]
    assert sorted(files) == ["code_reasoning.txt", "existence.txt", "posters.txt"]


def test_seed_submission_keeps_the_annotations_ids(tmp_path: Path) -> None:
    [content] = submission("seed", None, tmp_path, list("ABCDA")).values()
    assert content.splitlines()[0] == b'{"question_id": "101669", "prediction": "A"}' and len(content.splitlines()) == 5


def test_mm_vet_submission(tmp_path: Path) -> None:
    [content] = submission("mm_vet", None, tmp_path, ["x = -1", "b"]).values()
    assert content == b'{\n  "v1_0": "x = -1",\n  "v1_1": "b"\n}'


def test_mmbench_submission_is_the_official_sheet(tmp_path: Path) -> None:
    import openpyxl

    [(name, content)] = submission("mmbench", None, tmp_path, ["B", "=A1", "A\x01", "A", "D"]).items()
    book = openpyxl.load_workbook(io.BytesIO(content))
    rows = list(book.active.iter_rows(values_only=True))
    assert name == "mmbench_dev_20230712.xlsx" and book.sheetnames == ["Sheet1"]
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (
        241,
        "Identify the question that can be answered.",
        "Is it iron?",
        'Does "it" float?',
        None,
        None,
        "B",
        "B",
        "dev",
    )
    assert [row[6] for row in rows[1:]] == ["B", "=A1", "A", "A", "D", None] and book.active.cell(3, 7).data_type == "s"
    assert rows[2][2:6] == ("Left", None, "Right", None)


def test_mmbench_submission_without_openpyxl_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ConfigError, match=r'pip install -e ".\[evaluate\]"'):
        submission("mmbench", None, tmp_path, ["B"])


def test_qbench_test_split_is_handed_in(tmp_path: Path) -> None:
    [(name, content)] = submission("qbench", "test", tmp_path, ["A", "B"]).items()
    assert name == "llvisionqa_test_answers.jsonl" and json.loads(content.splitlines()[1])["response"] == "B"

"""Answers are paired with questions and labels by id, text and picture; missing and foreign answers are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_writers import SHORT, question_row, write_jsonl
from forked_tools import run_tool
from official_files import WRITERS

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.answers import make_answer, read_answers, write_rows
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.task import Scores
from megatron_share4v.evaluate.tasks import get_task

SPLITS = ("random", "popular", "adversarial")
LABELS = ("yes", "no", "yes", "no", "no", "yes")


def write_pope(root: Path, *, questions: dict[str, list[int]], labels: dict[str, list[int]]) -> None:
    """Write a POPE folder with the given objects of each split, in this order."""
    WRITERS["pope", None](root)  # the pictures
    rows = [
        question_row(1000 * start + k, f"COCO_val2014_{0:012}.jpg", f"Is there a thing{k} in the image?{SHORT}", name)
        for start, name in enumerate(SPLITS)
        for k in questions[name]
    ]
    write_jsonl(root / "llava_pope_test.jsonl", rows)
    for name in SPLITS:
        known = [
            {
                "question_id": number,
                "image": f"COCO_val2014_{0:012}.jpg",
                "text": f"Is there a thing{k} in the image?",
                "label": LABELS[k],
            }
            for number, k in enumerate(labels[name])
        ]
        write_jsonl(root / f"coco/coco_pope_{name}.json", known)


def right_answers(items: list[Doc]) -> list:
    return [make_answer(item, LABELS[int(str(item.question_id)[-1])].capitalize()) for item in items]


def score(name: str, root: Path, answers_of, split: str | None = None) -> Scores:
    task = get_task(name)
    folder = task.open(root, split)
    items = task.items(folder)
    return task.score(folder, items, answers_of(items))


def every(order: list[int]) -> dict[str, list[int]]:
    return dict.fromkeys(SPLITS, order)


@pytest.mark.parametrize(
    ("questions", "labels"),
    [
        (every([0, 1, 2, 3, 4, 5]), every([0, 1, 2, 3, 4, 5])),
        # the newest label file has labels of further questions, as 3,000 for 2,910 in `random`
        ({**every([0, 1, 2, 3, 4, 5]), "random": [0, 1, 3, 4, 5]}, every([0, 1, 2, 3, 4, 5])),
        (every([0, 1, 2, 3, 4, 5]), every([5, 3, 1, 0, 2, 4])),
    ],
    ids=["same", "more labels", "other order"],
)
def test_perfect_model_has_full_marks_in_pope(
    questions: dict[str, list[int]], labels: dict[str, list[int]], tmp_path: Path
) -> None:
    write_pope(tmp_path, questions=questions, labels=labels)
    scores = score("pope", tmp_path, right_answers)
    assert (scores.values["f1"], scores.headline, scores.note, scores.complete) == (100.0, "f1", "", True)


def test_pope_labels_of_releases_with_other_spellings(tmp_path: Path) -> None:
    write_pope(tmp_path, questions=every([0, 1, 2]), labels=every([0, 1, 2]))
    path = tmp_path / "coco/coco_pope_random.json"
    path.write_text(path.read_text().replace("a thing0 in the image", "an thing0 in the imange"))
    assert score("pope", tmp_path, right_answers).complete


def test_pope_questions_without_a_label_are_counted(tmp_path: Path) -> None:
    write_pope(tmp_path, questions=every([0, 1, 2, 3]), labels={**every([0, 1, 2, 3]), "popular": [0, 2, 3]})
    scores = score("pope", tmp_path, right_answers)
    assert scores.values["f1"] == 100.0 and not scores.complete
    assert "1 of 4 questions of popular have no label in" in scores.note and "thing1" in scores.note
    write_pope(tmp_path, questions=every([0, 1, 2, 3]), labels={**every([0, 1, 2, 3]), "popular": [0]})
    with pytest.raises(DataError, match=r"3 of 4 questions of popular have no label(.|\n)*e3e39262"):
        score("pope", tmp_path, right_answers)


# What each official script does with a question without an answer: headline, value, part of the note
MISSING = {
    ("vqav2", "val2014"): ("accuracy", 83.33, "they count as wrong"),
    ("gqa", None): (None, None, "the official script stops at them; no score: GQA: no prediction for 1 of 6"),
    ("vizwiz", "val"): ("accuracy", 80.0, "they count as wrong"),
    ("textvqa", None): ("accuracy", 100.0, "left out"),
    ("science_qa", None): ("image accuracy", 100.0, "left out"),
    ("pope", None): ("f1", 100.0, "left out"),
    ("seed", None): ("image accuracy", 80.0, "they count as wrong"),
    ("qbench", None): ("accuracy", 100.0, "left out"),
    ("mmbench", None): ("accuracy", 75.0, "they count as wrong"),
    ("mme", None): (None, None, "no score: MME scores a picture by the answers to all its questions; 1 pictures"),
    ("custom", None): ("accuracy", 75.0, "they count as wrong"),
}
RIGHT = {
    ("vqav2", "val2014"): ["red", "yes", "2", "an umbrella", "park", "Stop"],
    ("gqa", None): ["no", "women", "right", "sidewalk", "yes", "man"],
    ("vizwiz", "val"): ["soda", "unanswerable", "cat", "vanilla", "no"],
    ("textvqa", None): ["dakota", "reebok", "22", "9-1", "moo"],
    ("science_qa", None): ["B", "B", "B", "A", "B"],
    ("pope", None): ["Yes", "No", "Yes", "No"] * 3,
    ("seed", None): list("ABCDA"),
    ("qbench", None): ["B", "A", "D", "A", "B"],
    ("mmbench", None): ["B", "A", "A", "A", "D", "C"],
    ("mme", None): ["Yes", "No"] * 3,
    ("custom", None): ["two", "puppy", "puppy", "puppy", "x"],
}


@pytest.mark.parametrize("case", MISSING, ids=lambda case: "-".join(filter(None, case)))
def test_missing_answer_is_counted_and_shifts_nothing(case: tuple[str, str | None], tmp_path: Path) -> None:
    """All answers but the third one are given, in reverse order, through an answer file."""
    name, split = case
    WRITERS[case](tmp_path)
    task = get_task(name)
    items = task.items(task.open(tmp_path, split))
    answers = [make_answer(item, text) for item, text in zip(items, RIGHT[case], strict=True)]
    rows = list(task.rows(items, answers[:2] + answers[3:], model="m"))
    write_rows(tmp_path / "answers.jsonl", rows[::-1])
    scores = score(name, tmp_path, lambda items: read_answers(tmp_path / "answers.jsonl", items), split)
    headline, value, note = MISSING[case]
    assert scores.headline == headline and not scores.complete
    assert f"1 of {len(items)} questions have no answer, the first is {items[2].question_id!r}" in scores.note
    assert note in scores.note
    assert value is None or scores.values[headline] == pytest.approx(value)


def docs() -> list[Doc]:
    picture = Path("pictures/a.png")
    return [
        Doc(id="1", question_id=1, prompt="Is there a dog?" + SHORT, image=picture),
        Doc(id="1~2", question_id=1, prompt="Is there a cat?" + SHORT, image=picture),
        Doc(id="2", question_id="2", prompt="What?", image=Path("pictures/b.png")),
        Doc(id="2~2", question_id=2, prompt="Say hello."),
    ]


def row(number: object, prompt: str | None, text: str = "x", **more: object) -> dict[str, object]:
    return {"question_id": number} | ({} if prompt is None else {"prompt": prompt}) | {"text": text} | more


PAIRED = [  # rows, ids of the questions that they answer
    ([row(1, "Is there a cat?" + SHORT), row(1, "Is there a dog?" + SHORT)], ["1~2", "1"]),
    ([row("1", "<image>\nIs there a cat?")], ["1~2"]),  # the id as text, another directive
    ([row("2", "Say hello."), row(2, "What?", image="elsewhere/b.png")], ["2~2", "2"]),
    ([row(2, None), row("2", None)], ["2~2", "2"]),  # the type of the id decides
    ([row(1, "OCR tokens: x. Question: Is there a cat? Short answer:")], ["1~2"]),
]


@pytest.mark.parametrize(("rows", "ids"), PAIRED, ids=range(len(PAIRED)))
def test_rows_are_paired_by_id_and_text(rows: list[dict], ids: list[str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert [answer.id for answer in read_answers(tmp_path / "a.jsonl", docs())] == ids


REFUSED = [  # rows, message
    ([row(3, "What?")], r"a\.jsonl:1: question 3 is not in this benchmark. 1 of 1 rows name no question"),
    ([row(2, "Say hello.")] * 2, r"a\.jsonl:2: question 2 is answered already, first at .*a\.jsonl:1. 1 of 2 rows"),
    (
        [row("2", "Why?")],
        r"question '2' is 'What\?', and the row has 'Why\?'. 1 of 1 rows have .* another text",
    ),
    ([row("2", "What?", image="c.png")], "question '2' is about b.png, and the row about 'c.png'. 1 of 1 rows"),
    ([row(1, None)], "question 1 names 2 questions. 1 of 1 rows have an id that several questions share"),
    ([row(1, "Is there a cat?"), row(5, "a"), row(6, "a")], "question 5 is not in .* 2 of 3 rows .* has 4 questions"),
    ([{"text": "x"}], "a.jsonl:1: 'question_id' is 'None'"),
]


@pytest.mark.parametrize(("rows", "message"), REFUSED, ids=range(len(REFUSED)))
def test_rows_of_other_questions_are_refused_with_their_number(rows: list[dict], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        read_answers(tmp_path / "a.jsonl", docs())


def test_equal_questions_about_two_pictures_need_all_their_rows(tmp_path: Path) -> None:
    items = [Doc(id=f"1~{k}", question_id=1, prompt="What?", image=Path(f"{k}.png")) for k in range(2)]
    write_jsonl(tmp_path / "a.jsonl", [row(1, "What?", "a"), row(1, "What?", "b")])
    assert [answer.text for answer in read_answers(tmp_path / "a.jsonl", items)] == ["a", "b"]
    write_jsonl(tmp_path / "a.jsonl", [row(1, "What?", "b")])
    with pytest.raises(DataError, match="question 1 names 2 questions"):
        read_answers(tmp_path / "a.jsonl", items)


def test_shifted_qbench_rows_find_their_questions(tmp_path: Path) -> None:
    WRITERS["qbench", None](tmp_path)
    task = get_task("qbench")
    items = task.items(task.open(tmp_path))
    rows = list(task.rows(items, [make_answer(item, item.id) for item in items], model="m"))
    write_rows(tmp_path / "a.jsonl", rows[3:])
    assert [answer.id for answer in read_answers(tmp_path / "a.jsonl", items)] == ["3", "4"]


def test_official_seed_answers_may_hold_those_to_videos(tmp_path: Path) -> None:
    """LLaVA's question file, and so its answer file, has questions about videos, which the benchmark leaves out."""
    WRITERS["seed", None](tmp_path)
    task = get_task("seed")
    folder = task.open(tmp_path)
    items = task.items(folder)
    rows = list(task.rows(items, [make_answer(item, "A") for item in items], model="m"))
    write_rows(tmp_path / "a.jsonl", [*rows, {"question_id": "v0", "prompt": "What happens?", "text": "B"}])
    answers = read_answers(tmp_path / "a.jsonl", items, skipped=task.skipped(folder))
    assert [answer.id for answer in answers] == [item.id for item in items]
    with pytest.raises(DataError, match="question 'v0' is not in this benchmark"):
        read_answers(tmp_path / "a.jsonl", items)


def test_incomplete_answer_file_is_marked_partial(tmp_path: Path) -> None:
    """The tool ends with exit code 3, names the counts, and marks headline, result and table."""
    WRITERS["textvqa", None](tmp_path / "data")
    task = get_task("textvqa")
    items = task.items(task.open(tmp_path / "data"))
    answers = [make_answer(item, text) for item, text in zip(items, RIGHT["textvqa", None])]
    write_rows(tmp_path / "half.jsonl", task.rows(items, answers[:2], model="m"))
    command = ("tools/evaluate.py", "--answers", tmp_path / "half.jsonl", "--benchmark", "textvqa")
    done = run_tool(*command, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    shown = json.loads(done.stdout)
    assert shown["headline"] == {"name": "accuracy", "value": 100.0, "partial": True}
    assert (shown["complete"], shown["questions"], shown["answered"]) == (False, 5, 2)
    assert "3 of 5 questions have no answer" in shown["note"] and "3 of 5 questions" in done.stderr
    assert "(part of the questions)" in (tmp_path / "out/table.md").read_text()
    limited = run_tool(*command, "--data", tmp_path / "data", "--out", tmp_path / "limited", "--limit", 1)
    assert limited.returncode == 0, limited.stderr
    shown = json.loads(limited.stdout)
    assert shown["headline"]["partial"] and (shown["complete"], shown["questions"]) == (False, 1)


def test_differing_question_texts_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    WRITERS["mm_vet", None](tmp_path)
    path = tmp_path / "mm-vet.json"
    path.write_text(path.read_text().replace("Is this apple organic?", "Is it raining?"))
    get_task("mm_vet").items(get_task("mm_vet").open(tmp_path))
    [message] = caplog.messages
    assert "1 questions differ from those with the same id" in message and "llava-mm-vet.jsonl:4" in message


def test_vqav2_annotation_of_another_picture_is_refused(tmp_path: Path) -> None:
    WRITERS["vqav2", "val2014"](tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace('"image_id": 262150', '"image_id": 1'))
    with pytest.raises(DataError, match="question 262148002 is about image 262150, and in .* about 1"):
        get_task("vqav2").items(get_task("vqav2").open(tmp_path, "val2014"))

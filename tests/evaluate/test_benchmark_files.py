"""Missing, damaged and mismatched benchmark files: errors name the file, the expected layout and the source."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from benchmark_writers import write_json, write_jsonl
from official_files import WRITERS

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.answers import make_answer, read_answers, write_rows
from megatron_share4v.evaluate.benchmark_files import RequiredFile
from megatron_share4v.evaluate.tasks import get_task

CASES = [
    (name, split, need)
    for name, split in WRITERS
    for need in get_task(name).needs
    if need.names != ("./",) and (not need.splits or get_task(name).split(split) in need.splits)
]


def items(name: str, data: Path, split: str | None = None) -> list:
    task = get_task(name)
    return task.items(task.open(data, split))


@pytest.mark.parametrize(
    ("name", "split", "need"), CASES, ids=lambda part: part.key if isinstance(part, RequiredFile) else str(part)
)
def test_each_missing_file_is_named(name: str, split: str | None, need: RequiredFile, tmp_path: Path) -> None:
    WRITERS[name, split](tmp_path)
    paths = [tmp_path / known.replace("{split}", get_task(name).split(split)) for known in need.names]
    removed = [path for path in paths if path.exists()]
    assert removed, "the fixture has no such file"
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as raised:
        items(name, tmp_path, split)
    message = str(raised.value)
    assert f"{paths[0]} does not exist" in message  # what
    assert (
        f"MISSING {' or '.join(known.replace('{split}', get_task(name).split(split)) for known in need.names)}: "
        f"{need.source}" in message
    )
    assert f"expected below --data {tmp_path}:" in message and raised.value.exit_code == 2
    for other in get_task(name).needs:
        if not other.splits or get_task(name).split(split) in other.splits:
            assert other.source in message  # the whole layout


@pytest.mark.parametrize(
    ("name", "split", "need"), [case for case in CASES if not case[2].names[0].endswith("/")], ids=str
)
def test_each_damaged_file_is_named(name: str, split: str | None, need: RequiredFile, tmp_path: Path) -> None:
    WRITERS[name, split](tmp_path)
    task = get_task(name)
    path = task.open(tmp_path, split)[need.key]
    path.write_bytes(path.read_bytes()[:-20] + b"\xff\xfe{")
    with pytest.raises(DataError, match=path.name):
        loaded = items(name, tmp_path, split)
        task.submission(task.open(tmp_path, split), loaded, [])  # only the submission reads the test2015 list of VQA-v2


@pytest.mark.parametrize(("name", "split"), [case for case in WRITERS if not case[0].startswith("mmbench")])
def test_missing_image_is_named_on_load(name: str, split: str | None, tmp_path: Path) -> None:
    WRITERS[name, split](tmp_path)
    gone = next(item.image for item in items(name, tmp_path, split)[2:] if item.image)
    gone.unlink()
    with pytest.raises(DataError, match=gone.name):
        items(name, tmp_path, split)


@pytest.mark.parametrize("name", [name for name, split in WRITERS if split is None])
def test_no_questions_at_all(name: str, tmp_path: Path) -> None:
    WRITERS[name, None](tmp_path)
    path = get_task(name).open(tmp_path)["questions"]
    header = path.read_text().split("\n")[0] + "\n" if path.suffix == ".tsv" else ""
    path.write_text("[]" if path.suffix == ".json" else header)
    with pytest.raises(DataError, match="have no questions"):
        items(name, tmp_path)


@pytest.mark.parametrize("name", ["vqav2", "gqa", "vizwiz", "textvqa", "mme", "pope", "seed"])
def test_questions_without_directive_are_rejected(name: str, tmp_path: Path) -> None:
    WRITERS[name, None](tmp_path)
    path = get_task(name).open(tmp_path)["questions"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [{**row, "text": row["text"].split("\n")[0]} for row in rows])
    with pytest.raises(DataError, match=rf"{path.name}:1: the text is .* does not end with"):
        items(name, tmp_path)


MISMATCHED = [  # benchmark, file, content, error message
    ("gqa", "data/testdev_balanced_questions.json", {"1": {}}, "question 201307251 is not in"),
    ("textvqa", "TextVQA_0.5.1_val.json", {"data": []}, "'what is the brand of this camera\\?' is not in"),
    ("science_qa", "problems.json", {}, "entry 0: problem 21192 is not in the test split"),
    ("science_qa", "pid_splits.json", {"test": ["21195"]}, "problem 21192 is not in the test split"),
    ("seed", "SEED-Bench.json", {"questions": []}, "llava-seed-bench.jsonl:1: question 101669 is not in"),
    (
        "mm_vet",
        "mm-vet.json",
        {"v1_0": {"question": "q", "answer": "a", "capability": []}},
        "v1_1: 'v1_1' is 'None'; expected a dict",
    ),
    ("mm_vet", "mm-vet.json", [], "holds a JSON list, expected a dict"),
    ("qbench", "llvisionqa_dev.json", [{"question": "q", "candidates": ["a"]}], "entry 0: 'correct_ans' is 'None'"),
    ("qbench", "llvisionqa_dev.json", [3], "entry 0: 'question' is 'None'"),
]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"), MISMATCHED, ids=lambda part: part if isinstance(part, str) else ""
)
def test_mismatched_files_are_rejected(name: str, file: str, content: object, message: str, tmp_path: Path) -> None:
    WRITERS[name, None](tmp_path)
    write_json(tmp_path / file, content)
    with pytest.raises(DataError, match=message):
        items(name, tmp_path)


OWN_QUESTIONS = [  # questions.jsonl, message
    (
        '{"image": "0.png", "text": "What?"}',
        r"jsonl:1: 'question_id' is 'None'; expected an int or a str. Write a line as",
    ),
    (
        '[{"question_id": 1, "text": "What?"}]',
        "jsonl:1: is a JSON list; expected one object per line, without the brackets",
    ),
    ('{"question_id": 1, "text": "a", "image": ["0.png", "1.png"]}', r"'image' is .*; expected a str. Write a line as"),
    (
        '{"question_id": 1, "text": "a", "images": ["0.png", "1.png"]}',
        r"'images' is .*; expected a str. Write a line as",
    ),
    ('{"question_id": 1, "text": "a", "picture": "0.png"}', "'picture' is '0.png', which is not read"),
    ('{"question_id": 1, "text": "a", "image": "' + 5000 * "x" + '"}', r"image 'xx.{1,60} is neither in"),
    ('{"question_id": 1, "image": "0.png"}', "'text' is 'None'; expected a str. Write a line as"),
]


@pytest.mark.parametrize(("content", "message"), OWN_QUESTIONS, ids=range(len(OWN_QUESTIONS)))
def test_own_questions_with_a_mistake(content: str, message: str, tmp_path: Path) -> None:
    WRITERS["custom", None](tmp_path)
    (tmp_path / "questions.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        items("custom", tmp_path)


def test_own_questions_may_list_one_picture_or_none(tmp_path: Path) -> None:
    WRITERS["custom", None](tmp_path)
    rows = [{"question_id": k, "text": "a", "image": image} for k, image in enumerate((["0.png"], [], None, "2.png"))]
    rows += [{"question_id": 4, "text": "a", "images": ["1.png"]}]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    images = [item.image and item.image.name for item in items("custom", tmp_path)]
    assert images == ["0.png", None, None, "2.png", "1.png"]


def test_mme_without_its_own_text_files(tmp_path: Path) -> None:
    WRITERS["mme", None](tmp_path)
    text = tmp_path / "MME_Benchmark_release_version/posters/questions_answers_YN/tt0116209.txt"
    text.write_text("Is it another question? Please answer yes or no.\tYes\n")
    with pytest.raises(DataError, match="MME has no question 'Is this movie titled moonstruck"):
        items("mme", tmp_path)
    text.unlink()
    with pytest.raises(DataError, match="questions_answers_YN has no .txt(.|\n)*expected below"):
        items("mme", tmp_path)


def test_pope_with_an_unknown_category(tmp_path: Path) -> None:
    WRITERS["pope", None](tmp_path)
    path = tmp_path / "llava_pope_test.jsonl"
    path.write_text(path.read_text().replace('"popular"', '"common"'))
    with pytest.raises(
        DataError, match=r"llava_pope_test.jsonl:9: category 'common' is none of random, popular, adversarial"
    ):
        items("pope", tmp_path)


def test_llava_bench_without_a_reference(tmp_path: Path) -> None:
    WRITERS["llava_bench", None](tmp_path)
    lines = (tmp_path / "answers_gpt4.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers_gpt4.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(DataError, match=r"questions.jsonl:4: question 3 needs .* a reference answer"):
        items("llava_bench", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("\t/9j/", "\t!!", "row 241: its image is no base64"), ("\n300\t", "\nx\t", "row x: has no number in index")],
)
def test_mmbench_with_a_damaged_row(old: str, new: str, message: str, tmp_path: Path) -> None:
    WRITERS["mmbench", None](tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        items("mmbench", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mme", "MME"), ("mm_vet", "mm-vet"), ("llava_bench", "llava-bench-in-the-wild"), ("seed", "seed_bench")],
)
def test_data_may_be_the_playground_folder(name: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    WRITERS[name, None](tmp_path / folder)
    assert items(name, tmp_path) == items(name, tmp_path / folder)


def test_share4v_files_take_precedence(tmp_path: Path) -> None:
    WRITERS["pope", None](tmp_path)
    rows = (tmp_path / "llava_pope_test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "share4v_pope_test.jsonl").write_text("".join(rows[:8]))
    assert len(items("pope", tmp_path)) == 8


TEXTS = (".json", ".jsonl", ".tsv", ".txt")


@pytest.mark.parametrize(("name", "split"), WRITERS, ids=lambda part: part or "")
def test_files_may_begin_with_a_byte_order_mark(name: str, split: str | None, tmp_path: Path) -> None:
    WRITERS[name, split](tmp_path)
    task = get_task(name)
    folder = task.open(tmp_path, split)
    expected = items(name, tmp_path, split)
    answers = [make_answer(item, "A") for item in expected]
    submission = task.submission(folder, expected, answers)
    for path in tmp_path.rglob("*"):
        if path.suffix in TEXTS:
            ending = b"\n" if path.suffix == ".tsv" else b"\r\n"  # cells may hold line ends
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", ending))
    assert items(name, tmp_path, split) == expected
    assert {**task.submission(folder, expected, answers)}.keys() == submission.keys()
    write_rows(tmp_path / "answers.jsonl", task.rows(expected, answers, model="m"))
    content = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    # two files with a mark, joined
    (tmp_path / "answers.jsonl").write_bytes(b"".join(b"\xef\xbb\xbf" + part for part in (content[0], *content[1:])))
    assert read_answers(tmp_path / "answers.jsonl", expected) == answers


def change_mmbench_images(path: Path, image_of: Mapping[str, str]) -> None:
    """Replace the image cells of the rows with these indices."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"image": image_of.get(row["index"], row["image"])} for row in rows)


def test_mmbench_row_may_refer_to_the_image_of_another_row(tmp_path: Path) -> None:
    """Newer files write the index of another row in place of a repeated image, also of three digits, and in a chain."""
    WRITERS["mmbench", None](tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    before = items("mmbench", tmp_path)
    change_mmbench_images(path, {"1000241": "241", "300": "1000301", "301": "300"})
    after = items("mmbench", tmp_path)
    images = {item.question_id: item.image for item in before}
    owners = {1000241: 241, 300: 1000301, 301: 1000301}
    assert [item.image for item in after] == [images[owners.get(item.question_id, item.question_id)] for item in after]
    assert [item.prompt for item in after] == [item.prompt for item in before]


@pytest.mark.parametrize("index", ["\u00b2", "9" * 5000, "1.0"])
def test_mmbench_row_with_another_index(index: str, tmp_path: Path) -> None:
    WRITERS["mmbench", None](tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("\n300\t", f"\n{index}\t"), encoding="utf-8")
    with pytest.raises(DataError, match="has no number in index"):
        items("mmbench", tmp_path)


@pytest.mark.parametrize(
    ("image_of", "message"),
    [
        ({"300": "99"}, "row 300: its image is the one of row 99, and there is no row 99"),
        (
            {"300": "301", "301": "300"},
            "row 300: its image is the one of row 301, and the rows refer to each other",
        ),
        ({"300": "301", "301": "!!"}, "row 301: its image is no base64"),
    ],
)
def test_mmbench_row_with_a_wrong_reference(image_of: dict[str, str], message: str, tmp_path: Path) -> None:
    WRITERS["mmbench", None](tmp_path)
    change_mmbench_images(tmp_path / "mmbench_dev_20230712.tsv", image_of)
    with pytest.raises(DataError, match=message):
        items("mmbench", tmp_path)

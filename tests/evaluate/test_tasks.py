"""Benchmark tasks: exact official prompts, answer rows, and scores of fixed answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_writers import encode_picture, write_jsonl
from official_files import WRITERS

from megatron_share4v.data.images.pil_decoder import validate_image
from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.evaluate.answers import answer_id, make_answer, read_answers, write_rows
from megatron_share4v.evaluate.metrics.profile import CORRECTED
from megatron_share4v.evaluate.records import Answer, Decoding, Doc
from megatron_share4v.evaluate.tasks import TASKS, get_task
from megatron_share4v.text.template import get_template

LOADER, MMBENCH, CROPPED = Decoding(128, "pad", "user"), Decoding(1024, "pad", "user"), Decoding(1024, "crop", "user")
QBENCH = Decoding(1024, "crop", "human")

SHORT, LETTER = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
)
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
# benchmark and split: decoding, number of questions; index, question_id, user turn and recorded prompt of one question
PROMPTS = {
    ("vqav2", None): (LOADER, 6, 1, 1001, "<image>\nIs it raining?" + SHORT, "Is it raining?" + SHORT),
    ("vqav2", "val2014"): (LOADER, 6, 2, 262148002, "<image>\nHow many dogs?" + SHORT, "How many dogs?" + SHORT),
    ("gqa", None): (
        LOADER,
        6,
        3,
        "20341097",
        "<image>\nWhere is that fire hydrant?" + SHORT,
        "Where is that fire hydrant?" + SHORT,
    ),
    ("vizwiz", None): (
        LOADER,
        5,
        1,
        1,
        "<image>\nThis is a box." + UNANSWERABLE + SHORT,
        "This is a box." + UNANSWERABLE + SHORT,
    ),
    ("vizwiz", "val"): (
        LOADER,
        5,
        0,
        0,
        "<image>\nWhat is this?" + UNANSWERABLE + SHORT,
        "What is this?" + UNANSWERABLE + SHORT,
    ),
    ("textvqa", None): (
        LOADER,
        5,
        2,
        "8cfd3916eac85404",
        "<image>\nWhat is the highest number on the players shorts?\nReference OCR token: R, Reebo, Ex" + SHORT,
        "What is the highest number on the players shorts?\nReference OCR token: R, Reebo, Ex" + SHORT,
    ),
    ("science_qa", None): (
        CROPPED,
        5,
        3,
        "21200",
        "<image>\nContext: A bulldozer clears a path.\nWhat is the direction of this push?\nA. away from the "
        "bulldozer\nB. toward the bulldozer" + LETTER,
        "<image>\nContext: A bulldozer clears a path.\nWhat is the direction of this push?\nA. away from the "
        "bulldozer\nB. toward the bulldozer" + LETTER,
    ),
    ("mme", None): (
        LOADER,
        6,
        3,
        "posters/images/tt0116209.jpg",
        "<image>\nIs this movie directed by jing wong?" + SHORT,
        "Is this movie directed by jing wong?" + SHORT,
    ),
    ("pope", None): (
        LOADER,
        12,
        4,
        10000001,
        "<image>\nIs there a snowboard in the image?" + SHORT,
        "Is there a snowboard in the image?" + SHORT,
    ),
    ("seed", None): (
        LOADER,
        5,
        1,
        101670,
        "<image>\nHow many towels are in image 1?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER,
        "How many towels are in image 1?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER,
    ),
    ("qbench", None): (
        QBENCH,
        5,
        1,
        1,
        "<image>\nIs it bright?\nChoose between one of the options as follows:\nA. Yes\nB. No\n",
        None,
    ),
    ("qbench", "test"): (
        QBENCH,
        5,
        0,
        0,
        "<image>\nHow is the clarity?\nChoose between one of the options as follows:\nA. Clear\nB. Blurry\nC. Fair\n",
        None,
    ),
    ("mmbench", None): (
        MMBENCH,
        6,
        0,
        241,
        '<image>\nMagnets pull.\nOr push.\nIdentify the question that can be answered.\nA. Is it iron?\nB. Does "it" '
        "float?" + LETTER,
        'Magnets pull.\nOr push.\nIdentify the question that can be answered.\nA. Is it iron?\nB. Does "it" float?',
    ),
    ("mmbench_cn", None): (
        MMBENCH,
        6,
        2,
        300,
        "<image>\nWhere is the cat?\nA. On the mat\nB. Under it\n请直接回答选项字母。",
        "Where is the cat?\nA. On the mat\nB. Under it",
    ),
    ("llava_bench", None): (CROPPED, 5, 2, 2, "<image>\nWhy?", "Why?"),
    ("mm_vet", None): (CROPPED, 5, 0, 0, "<image>\nWhat is x in the equation?", "What is x in the equation?"),
    ("custom", None): (CROPPED, 5, 1, 1, "<image>\nWhat is it, 1?", "What is it, 1?"),
}

# fixed answers in question order, and scores computed by hand
EXPECTED_SCORES = {
    ("vqav2", "val2014"): (
        ["Red", "yes", "Two", "An umbrella", "the park", "Stop"],
        {"accuracy": 66.67, "answer type other": 50.0},
    ),
    # All ten agree on "Red" and "the park", so VQAEval compares literally; "Stop" matches.
    ("gqa", None): (
        ["No.", "Women", "right", "on the sidewalk", "Yes", " man"],
        {"accuracy": 400 / 6, "binary": 100.0, "open": 100 / 3},
    ),
    ("vizwiz", "val"): (
        ["Soda", "Unanswerable.", "dog", "the vanilla", "yes"],
        {"accuracy": (100 + 100 + 60 + 100 + 0) / 5},
    ),
    ("textvqa", None): (["Dakota", "Reebok.", "twenty two", "9 1", "MOO"], {"accuracy": 80.0}),
    ("science_qa", None): (
        ["B", "B. peach", "The answer is B.", "C", "FAILED"],
        {"image accuracy": 200 / 3, "accuracy": 60.0},
    ),
    ("mme", None): (
        ["Yes", "No", "yes, it is", "Hardly", "No", "No."],
        {"existence": 200.0, "posters": 50.0, "code_reasoning": 50.0},
    ),
    ("pope", None): (
        ["Yes", "No", "Yes", "Yes"] * 3,
        {"f1": 80.0, "accuracy": 75.0, "yes ratio": 75.0, "random precision": 200 / 3},
    ),
    ("seed", None): (
        ["A", "B", "C.", "A", "A"],
        {"image accuracy": 60.0, "image accuracy, first character": 80.0, "Scene Understanding": 200 / 3},
    ),
    ("qbench", None): (["B. Blurry", "Yes", "C. Road", "A", "Dull"], {"accuracy": 80.0}),
    ("mmbench", None): (
        ["B", "A", "On the mat", "A", "D", "2 or 3"],
        {"accuracy": 75.0, "FP-S": 0.0, "rows that a judge would read": 1.0},
    ),
    ("mmbench_cn", None): (["B", "A", "A", "A", "D", "C"], {"accuracy": 100.0, "rows that a judge would read": 0.0}),
    ("custom", None): (["two", "Dog", "a cat", "the puppy", "I am"], {"accuracy": 75.0}),
}


@pytest.fixture(params=WRITERS, ids=lambda case: "-".join(filter(None, case)))
def case(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    return request.param


@pytest.fixture
def data(case: tuple[str, str | None], tmp_path: Path) -> Path:
    WRITERS[case](tmp_path)
    return tmp_path


def test_official_prompt(case: tuple[str, str | None], data: Path) -> None:
    task = get_task(case[0])
    items = task.items(task.open(data, case[1]))
    decoding, count, number, question_id, turn, recorded = PROMPTS[case]
    item = items[number]
    assert task.decoding() == decoding
    assert len(items) == count == len({each.id for each in items})
    assert (item.question_id, item.turn) == (question_id, turn)
    if recorded is not None:
        [row] = task.rows(items, [make_answer(item, "x")], model="m")
        assert row["prompt"] == recorded
    assert all(validate_image(each.read_image()).width == 12 for each in items if each.image is not None)
    assert [each.id for each in task.items(task.open(data, case[1]))] == [each.id for each in items]


def test_answers_to_score(case: tuple[str, str | None], data: Path, tmp_path: Path) -> None:
    """The answer file round-trips, and its scores match the table."""
    task = get_task(case[0])
    folder = task.open(data, case[1])
    items = task.items(folder)
    texts, expected = EXPECTED_SCORES.get(case, (["A"] * len(items), {}))
    answers = [make_answer(item, text) for item, text in zip(items, texts, strict=True)]
    write_rows(tmp_path / "out/answers.jsonl", task.rows(items, reversed(answers), model="tiny"))
    assert [answer.text for answer in read_answers(tmp_path / "out/answers.jsonl", items)] == texts
    assert read_answers(tmp_path / "out/answers.jsonl", items) == answers
    scores = task.score(folder, items, answers)
    assert {name: scores.values[name] for name in expected} == pytest.approx(expected)
    assert bool(expected) == bool(scores.values)
    is_whole = case in EXPECTED_SCORES and case[0] != "mme"  # the MME fixture has 3 of 14 subtasks
    assert scores.headline == (task.headline if is_whole else None)
    assert is_whole or scores.note
    json.dumps(scores.json_values, allow_nan=False)


def test_official_rows(tmp_path: Path) -> None:
    """Fields and field order of the common, MMBench and Q-Bench formats."""
    rows = {}
    for name in ("vqav2", "mmbench", "qbench"):
        WRITERS[name, None](tmp_path)
        items = TASKS[name].items(TASKS[name].open(tmp_path))
        [rows[name]] = TASKS[name].rows(items, [make_answer(items[2], "B")], model="llava")
    common = {
        "question_id": 1002,
        "prompt": "How many dogs?\nAnswer the question using a single word or phrase.",
        "text": "B",
    }
    assert list(rows["vqav2"].items()) == [
        *common.items(),
        ("answer_id", answer_id("1002", "B")),
        ("model_id", "llava"),
        ("metadata", {}),
    ]
    assert list(rows["mmbench"].items()) == [
        ("question_id", 300),
        ("round_id", 0),
        ("prompt", "Where is the cat?\nA. On the mat\nB. Under it"),
        ("text", "B"),
        ("options", ["On the mat", "Under it"]),
        ("option_char", ["A", "B"]),
        ("answer_id", answer_id("300", "B")),
        ("model_id", "llava"),
        ("metadata", {}),
    ]
    assert list(rows["qbench"]) == ["img_path", "question", "candidates", "type", "concern", "correct_ans", "response"]


@pytest.mark.parametrize("name", TASKS)
def test_corrected_profile_uses_training_image_mode_and_prompt(name: str) -> None:
    official, corrected = get_task(name).decoding(), get_task(name).decoding(CORRECTED)
    assert (corrected.image_mode, corrected.system, corrected.max_new_tokens) == (
        "pad",
        "user",
        official.max_new_tokens,
    )
    assert (official != corrected) == (name in {"science_qa", "llava_bench", "mm_vet", "qbench", "custom"})
    assert {"pad": "pad", "crop": "square"}[official.image_mode] == official.aspect_ratio
    assert official.template == ("share4v_v1" if name == "qbench" else "vicuna_v1")


def test_corrected_profile_reaches_the_scores(tmp_path: Path) -> None:
    WRITERS["science_qa", None](tmp_path)
    task = get_task("science_qa")
    folder = task.open(tmp_path)
    items = task.items(folder)
    answers = [make_answer(item, "B.") for item in items]
    assert task.score(folder, items, answers).values["accuracy"] == 0.0
    assert task.score(folder, items, answers, profile=CORRECTED).values["accuracy"] == 80.0


@pytest.mark.parametrize(
    ("text", "clean"),
    [(" A </s>", "A"), ("A</s></s>", "A</s>"), ("</s>", ""), (" a\n", "a"), ("A </s> ", "A"), ("A</s>.", "A</s>.")],
)
def test_output_is_cleaned_like_the_scripts(text: str, clean: str) -> None:
    assert LOADER.clean(text) == clean


def test_answer_ids_depend_on_question_and_text() -> None:
    assert answer_id("1", "yes") == answer_id("1", "yes") and len(answer_id("1", "yes")) == 22
    assert len({answer_id(name, text) for name in ("1", "2", "1~2") for text in ("yes", "no", "")}) == 9


def test_repeated_question_ids_get_unique_ids(tmp_path: Path) -> None:
    WRITERS["mme", None](tmp_path)
    items = get_task("mme").items(get_task("mme").open(tmp_path))
    assert [item.id for item in items[:2]] == ["existence/000000006040.jpg", "existence/000000006040.jpg~2"]
    answers = [Answer(item.id, item.prompt, str(k)) for k, item in enumerate(items)]
    write_rows(tmp_path / "a.jsonl", get_task("mme").rows(items, answers, model="m"))
    assert read_answers(tmp_path / "a.jsonl", items) == answers


def test_answer_without_a_text_is_rejected(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"question_id": 1}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'text' is 'None'"):
        read_answers(tmp_path / "a.jsonl", [Doc(id="1", question_id=1, prompt="p")])


def test_images_are_read_on_demand(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert Doc(id="1", question_id=1, prompt="p", image=encode_picture(1)).read_image() == encode_picture(1)
    assert Doc(id="1", question_id=1, prompt="p").read_image() is None
    for name, why in (("gone.png", "cannot be read"), ("empty.png", "empty file")):
        with pytest.raises(DataError, match=f"{name} of question 7: .*{why}"):
            Doc(id="1", question_id=7, prompt="p", image=tmp_path / name).read_image()


def test_unknown_names() -> None:
    assert get_task("MM-Vet") is TASKS["mm_vet"]
    with pytest.raises(ConfigError, match="nearest is textvqa"):
        get_task("text_vqa2")
    with pytest.raises(ConfigError, match="no such split; test-dev2015, val2014"):
        get_task("vqav2").split("train")
    with pytest.raises(ConfigError, match="only one"):
        get_task("gqa").split("test")


@pytest.mark.parametrize(
    ("own", "used"),
    [
        (None, "vicuna_v1"), ("plain", "vicuna_v1"), ("share4v_v1", "vicuna_v1"), ("llama_3", "llama_3"),
        ("qwen_2.5", "qwen_2.5"), ("mistral", "mistral"),
    ],
)  # fmt: skip
def test_language_models_are_prompted_with_their_own_template(own: str | None, used: str) -> None:
    template = None if own is None else get_template(own)
    decoding = get_task("mme").decoding()
    assert decoding.prompt_template(template).name == used
    assert decoding.answer_end(template) == {"llama_3": "<|eot_id|>", "qwen_2.5": "<|im_end|>"}.get(used, "</s>")

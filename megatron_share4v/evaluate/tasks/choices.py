"""ScienceQA, SEED-Bench and Q-Bench: questions with lettered options. (MMBench has a file of its own.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile, Row, get_field, read_json, require
from megatron_share4v.evaluate.directives import LETTER
from megatron_share4v.evaluate.metrics import qbench, science_qa, seed
from megatron_share4v.evaluate.metrics.profile import Profile
from megatron_share4v.evaluate.records import Answer, Doc
from megatron_share4v.evaluate.task import (
    CROPPED,
    LEFT_OUT,
    LOADER,
    QBENCH,
    MetricValues,
    PredictionTexts,
    Task,
    encode_jsonl,
    item_ids,
)
from megatron_share4v.evaluate.tasks.questions import both, make_docs, playground, read_questions
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

_SCIENCE = "data/scienceqa of https://github.com/lupantech/ScienceQA"
_SEED = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
_QBENCH = "https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"


def _read_science(folder: BenchmarkFolder) -> Iterator[Doc]:
    problems, where = read_json(folder["problems"], dict), str(folder["questions"])
    split = set(get_field(read_json(folder["splits"], dict), "test", list, where=str(folder["splits"])))
    for number, row in enumerate(read_json(folder["questions"], list)):
        name = get_field(row, "id", str, where=f"{where}, entry {number}")
        if name not in problems or name not in split:
            raise DataError(
                f"{where}, entry {number}: problem {name} is not in the test split of {folder['problems']} and "
                f"{folder['splits'].name}"
            )
        problem = problems[name]
        require(problem, where=f"{folder['problems']}, {name}", choices=list, answer=int)
        turns = get_field(row, "conversations", list, where=f"{where}, {name}")
        text = (
            get_field(turns[0] if turns else {}, "value", str, where=f"{where}, {name}, first turn")
            .replace(IMAGE_PLACEHOLDER, "")
            .strip()
            + LETTER
        )
        image = folder.image(row["image"]) if "image" in row else None
        # The answer file's prompt has the placeholder, by which the scorer knows the image questions.
        recorded = f"{IMAGE_PLACEHOLDER}\n{text}" if image else text
        yield Doc(id=name, question_id=name, prompt=text, image=image, recorded=recorded, meta=problem)


def _measure_science(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    problems = [science_qa.ScienceProblem(item.id, item.meta["answer"], len(item.meta["choices"])) for item in items]
    answers = {
        item.id: science_qa.ScienceAnswer(texts[item.id], item.recorded or "") for item in items if item.id in texts
    }
    found = science_qa.score(problems, answers, profile=profile)
    return {"image accuracy": found.image_accuracy, "accuracy": found.accuracy}


def _seed_rows(folder: BenchmarkFolder) -> tuple[list[tuple[str, Row]], dict[str, Row]]:
    """Read all questions, those about videos too, and the annotations by question id."""
    truths = {}
    for number, truth in enumerate(
        get_field(read_json(folder["annotations"], dict), "questions", list, where=str(folder["annotations"]))
    ):
        where = f"{folder['annotations']}, question {number}"
        require(truth, where=where, answer=str, question_type_id=int, data_type=str)
        truths[str(get_field(truth, "question_id", (str, int), where=where))] = truth
    rows = list(read_questions(folder, ending=LETTER))
    for where, row in rows:
        if str(row["question_id"]) not in truths:
            raise DataError(
                f"{where}: question {row['question_id']} is not in {folder['annotations']}; take both files of "
                "SEED-Bench's first version"
            )
    return rows, truths


def _read_seed(folder: BenchmarkFolder) -> Iterator[Doc]:
    rows, truths = _seed_rows(folder)
    # LLaVA's file has frames of videos too; ShareGPT4V's number is of images.
    rows = [(where, row) for where, row in rows if truths[str(row["question_id"])]["data_type"] == "image"]
    yield from make_docs(folder, rows, truths)


def _seed_videos(folder: BenchmarkFolder) -> set[str]:
    rows, truths = _seed_rows(folder)
    names = {str(row["question_id"]) for _, row in rows}
    return {name for name in names if truths[name]["data_type"] != "image"}


def _measure_seed(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    kinds = {number: name for name, number in read_json(folder["annotations"], dict).get("question_type", {}).items()}
    questions = [
        seed.SeedQuestion(item.question_id, item.meta["answer"], item.meta["question_type_id"]) for item in items
    ]
    predictions = {item.question_id: texts[item.id] for item in items if item.id in texts}
    found, tolerant = seed.score(questions, predictions), seed.score(questions, predictions, tolerant=True)
    values = {"image accuracy": found.image, "image accuracy, first character": tolerant.image}
    return values | {str(kinds.get(number, number)): value for number, value in found.by_type.items()}


def _submit_seed(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> dict[str, bytes]:
    rows = [
        {"question_id": item.meta["question_id"], "prediction": texts[item.id]} for item in items if item.id in texts
    ]
    return {"seed_bench_image.jsonl": encode_jsonl(rows)}


def _read_qbench(folder: BenchmarkFolder) -> Iterator[Doc]:
    rows: list[Row] = read_json(folder["questions"], list)
    for number, (name, row) in enumerate(zip(item_ids(range(len(rows))), rows)):
        where = f"{folder['questions']}, entry {number}"
        text = get_field(row, "question", str, where=where) + "\nChoose between one of the options as follows:\n"
        for letter, candidate in zip("ABCD", get_field(row, "candidates", list, where=where)):
            text += f"{letter}. {candidate}\n"  # so the prompt ends with a line break
        if folder.split == "dev":
            get_field(row, "correct_ans", str, where=where)
        yield Doc(
            id=name,
            question_id=number,
            prompt=text,
            image=folder.image(get_field(row, "img_path", str, where=where)),
            meta=row,
        )


def _qbench_row(item: Doc, answer: Answer, model: str) -> dict[str, Any]:
    # The official tool appends such objects without line breaks, and a formatter puts them in later; the file is the
    # same after it.
    return {**item.meta, "response": answer.text}


def _measure_qbench(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    answered = [item for item in items if item.id in texts]
    answers = [
        qbench.QbenchAnswer(texts[item.id], item.meta["candidates"], item.meta["correct_ans"]) for item in answered
    ]
    return {"accuracy": qbench.score(answers, profile=profile).headline}


def _submit_qbench(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> dict[str, bytes]:
    rows = [{**item.meta, "response": texts[item.id]} for item in items if item.id in texts]
    return {"llvisionqa_test_answers.jsonl": encode_jsonl(rows)} if folder.split == "test" else {}


TASKS = (
    Task(
        name="science_qa",
        title="ScienceQA (image)",
        folder="scienceqa",
        official=CROPPED,
        headline="image accuracy",
        needs=(
            playground("questions", *both("test_CQM-A.json")),
            RequiredFile("problems", ("problems.json",), _SCIENCE),
            RequiredFile("splits", ("pid_splits.json",), _SCIENCE),
            RequiredFile("images", ("images/test/",), f"test.zip, as {_SCIENCE} says"),
        ),
        read=_read_science,
        measure=_measure_science,
        missing=LEFT_OUT,
    ),
    Task(
        name="seed",
        title="SEED-Bench (image)",
        folder="seed_bench",
        official=LOADER,
        headline="image accuracy",
        needs=(
            playground(
                "questions",
                "share4v-seed-bench-image.jsonl",
                "llava-seed-bench-image.jsonl",
                "share4v-seed-bench.jsonl",
                "llava-seed-bench.jsonl",
            ),
            RequiredFile("annotations", ("SEED-Bench.json",), _SEED),
            RequiredFile("images", ("./",), f"SEED-Bench-image.zip of {_SEED}, unpacked to SEED-Bench-image/"),
        ),
        read=_read_seed,
        measure=_measure_seed,
        skipped=_seed_videos,
        submit=_submit_seed,
        server="https://huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard",
    ),
    Task(
        name="qbench",
        title="Q-Bench (A1)",
        folder="qbench",
        official=QBENCH,
        headline="accuracy",
        splits=("dev", "test"),
        scored=("dev",),
        needs=(
            RequiredFile("questions", ("llvisionqa_{split}.json",), _QBENCH),
            RequiredFile("images", ("images_llvisionqa/",), f"images_llvisionqa.tar of {_QBENCH}"),
        ),
        read=_read_qbench,
        row=_qbench_row,
        measure=_measure_qbench,
        missing=LEFT_OUT,
        submit=_submit_qbench,
        server="Q-Bench's authors, see https://github.com/Q-Future/Q-Bench",
    ),
)

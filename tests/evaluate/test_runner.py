"""End-to-end evaluation with a tiny random model: every benchmark, resumption, replicas, and user errors."""

from __future__ import annotations

import base64
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_writers import encode_picture, write_jsonl
from fake_endpoint import completion, serving
from forked_tools import Tool, run_tool
from hf_fixtures import write_llava_hf
from official_files import WRITERS

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.clients import LocalClient, RemoteClient
from megatron_share4v.evaluate.loaded_benchmark import Evaluation
from megatron_share4v.evaluate.metrics.profile import CORRECTED
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.result import ModelFacts
from megatron_share4v.evaluate.runner import ANSWERS, FAILED, JOURNAL, Judge, run_benchmark
from megatron_share4v.infer.answer_log import DPGroup
from megatron_share4v.infer.batch_generate import GenerationResult
from megatron_share4v.infer.data_parallel import Replica, open_replica
from megatron_share4v.parallel.launch import World
from megatron_share4v.remote.openai_client import ChatClient, Endpoint

QUESTIONS = 18
# Benchmarks and splits with submission files.
SUBMITTED = {(name, None) for name in ("vqav2", "gqa", "vizwiz", "mme", "seed", "mmbench", "mmbench_cn", "mm_vet")} | {
    ("vizwiz", "val"),
    ("qbench", "test"),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_hf(tmp_path_factory.mktemp("evaluated") / "tiny")


@pytest.fixture(scope="module")
def replica(export: Path) -> Iterator[Replica]:
    with open_replica(export, tensor=1, max_requests=8, dtype="fp32", world=World.single_process()) as opened:
        yield opened


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Custom data set, long enough to be interrupted; some questions have no image."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "images").mkdir()
    for number in range(5):
        (folder / "images" / f"{number}.jpg").write_bytes(encode_picture(number))
    rows = [
        {"question_id": n, "text": f"What is {'in' * (n % 4)} number {n}?", "answer": "no"} for n in range(QUESTIONS)
    ]
    write_jsonl(
        folder / "questions.jsonl",
        [row | ({} if n % 6 == 5 else {"image": f"{n % 5}.jpg"}) for n, row in enumerate(rows)],
    )
    return folder


def evaluate(evaluation: Evaluation, replica: Replica, **more: object) -> dict:
    client = LocalClient(replica, decoding=evaluation.decoding, workers=2)
    return run_benchmark(evaluation, client, model=ModelFacts.of_replica(replica, name="tiny"), share=DPGroup(), **more)


def two_lines(items: Iterator[Doc]) -> Iterator[list[GenerationResult]]:
    """Client whose first answer has a line break."""
    yield [
        GenerationResult(item.id, text="no" if number else "yes\nno", tokens=3, finish_reason="stop")
        for number, item in enumerate(items)
    ]


@pytest.mark.parametrize(("name", "split"), WRITERS, ids=lambda part: part or "")
def test_every_benchmark_end_to_end(name: str, split: str | None, replica: Replica, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    WRITERS[name, split](tmp_path / "data")
    evaluation = Evaluation(name, data=tmp_path / "data", out=tmp_path / "out", split=split)
    if name == "mme":
        # The official calculation.py fails on an answer with a line break; the random model may produce one,
        # depending on batching.
        broken = Evaluation(name, data=tmp_path / "data", out=tmp_path / "broken")
        with pytest.raises(DataError, match="has a line break"):
            run_benchmark(broken, two_lines, model=ModelFacts.of_replica(replica, name="tiny"), share=DPGroup())
        evaluation = Evaluation(name, data=tmp_path / "data", out=tmp_path / "out", profile=CORRECTED)
    content = evaluate(evaluation, replica)
    rows = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
    assert len(rows) == len(evaluation.items) == content["questions"] >= 5
    assert all(row.get("model_id", "tiny") == "tiny" for row in rows)
    task = evaluation.task
    # The fixture lacks some MME subtasks, so there is no total.
    is_scored = (
        task.judged is None and task.measure is not None and evaluation.folder.split in task.scored and name != "mme"
    )
    assert (content["headline"] is not None) == is_scored and bool(content["note"]) != is_scored, content
    assert (
        len(content["checkpoint"]["tower_sha256"]) == 64
        and content["complete"] == (task.judged is None)  # the judge's replies are missing
        and content["checkpoint"]["dtype"] == "fp32"
    )
    pictures = content["preprocessing"]
    assert (pictures["pad_colour"], pictures["resample"], pictures["resize"]) == (
        (122, 116, 104),
        "bicubic",
        "shortest_edge",
    )
    assert (tmp_path / "out/submission").exists() == ((name, split) in SUBMITTED)
    assert ("| tiny" in (tmp_path / "out/table.md").read_text()) == is_scored
    if task.judged:
        assert len((tmp_path / "out/judge_requests.jsonl").read_text().splitlines()) == len(rows)


def command(export: Path, data: Path, out: Path, *more: object) -> list[object]:
    return [
        "tools/evaluate.py",
        export,
        "--benchmark",
        "custom",
        "--data",
        data,
        "--out",
        out,
        "--dtype",
        "fp32",
        "--name",
        "tiny",
        *more,
    ]


def test_answers_do_not_depend_on_batching_or_ranks(export: Path, questions: Path, tmp_path: Path) -> None:
    """Batch size 1, batch size 8 on two ranks, and a SIGKILL followed by resumption on two ranks."""
    whole = run_tool(*command(export, questions, tmp_path / "alone", "--batch-size", 1))
    assert whole.returncode == 0, whole.stderr
    shown = json.loads(whole.stdout.splitlines()[-1])
    assert shown["questions"] == QUESTIONS and shown["headline"]["name"] == "accuracy"
    shared = run_tool(*command(export, questions, tmp_path / "shared", "--batch-size", 8), ranks=2)
    assert shared.returncode == 0, shared.stderr
    killed = Tool(*command(export, questions, tmp_path / "killed", "--batch-size", 2))
    journal, deadline = tmp_path / "killed" / JOURNAL / "rank0.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = journal.read_bytes()
    assert before.count(b"\n") < QUESTIONS and not (tmp_path / "killed" / ANSWERS).exists()
    resumed = run_tool(*command(export, questions, tmp_path / "killed", "--batch-size", 8), ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "journaled answers are kept"
    answers = [(tmp_path / name / ANSWERS).read_bytes() for name in ("alone", "shared", "killed")]
    assert answers[0] == answers[1] == answers[2] and answers[0].count(b"\n") == QUESTIONS


def test_user_errors_are_one_message(export: Path, questions: Path, tmp_path: Path) -> None:
    done = run_tool(*command(export, tmp_path / "nowhere", tmp_path / "out"), "--benchmark", "pope")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    (tmp_path / "file").touch()
    for given, wanted in (
        (("--limit", "0"), "'0' is no whole number from 1"),
        (("--out", tmp_path / "file"), "cannot be a directory"),
        (("--compare", tmp_path / "file"), "invalid JSON"),
        (("--endpoint", "http://127.0.0.1:9/v1"), "give one of CKPT"),
    ):
        wrong = run_tool(*command(export, questions, tmp_path / "out"), *given)
        assert (
            wrong.returncode == 2
            and wanted in wrong.stderr
            and "Traceback" not in wrong.stderr
            and "answering on" not in wrong.stderr
        ), wrong.stderr
    assert "does not exist" in message and "coco_pope_random.json" in done.stderr and "https://" in done.stderr


def test_journal_of_other_settings_is_rejected(replica: Replica, questions: Path, tmp_path: Path) -> None:
    evaluate(Evaluation("custom", data=questions, out=tmp_path, limit=2), replica)
    content = evaluate(Evaluation("custom", data=questions, out=tmp_path, limit=3), replica)  # same questions: resumes
    assert content["questions"] == 3 and not content["complete"]
    with pytest.raises(DataError, match=r"image_mode was 'crop', now 'pad'"):
        evaluate(Evaluation("custom", data=questions, out=tmp_path, limit=3, profile=CORRECTED), replica)
    assert (
        evaluate(Evaluation("custom", data=questions, out=tmp_path, limit=3, profile=CORRECTED), replica, restart=True)[
            "profile"
        ]
        == "corrected"
    )


def test_question_about_a_changed_picture_is_asked_again(
    replica: Replica, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures in files and in a table; the other answers are kept."""
    data = broken_questions(tmp_path / "data", broken=set())
    (tmp_path / "mmbench").mkdir()
    WRITERS["mmbench", None](tmp_path / "mmbench")
    requested: list[str] = []

    def client(items: Iterator[Doc]) -> Iterator[list[GenerationResult]]:
        for item in items:
            requested.append(item.id)
            yield [GenerationResult(item.id, text="A", tokens=1, finish_reason="stop")]

    def run_again(name: str, folder: Path) -> list[str]:
        requested.clear()
        evaluation = Evaluation(name, data=folder, out=tmp_path / "out" / name)
        run_benchmark(evaluation, client, model=ModelFacts.of_replica(replica, name="tiny"), share=DPGroup())
        return list(requested)

    assert run_again("custom", data) == ["0", "1", "2"] and run_again("custom", data) == []
    (data / "1.jpg").write_bytes(encode_picture(5))
    assert run_again("custom", data) == ["1"] and "1 pictures have changed" in caplog.text
    assert len(run_again("mmbench", tmp_path / "mmbench")) == 6 and run_again("mmbench", tmp_path / "mmbench") == []
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    old, new = (base64.b64encode(encode_picture(number)).decode() for number in (0, 5))
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    assert run_again("mmbench", tmp_path / "mmbench") == ["241"]


def test_an_answer_file_is_scored_without_a_model(replica: Replica, questions: Path, tmp_path: Path) -> None:
    generated = evaluate(Evaluation("custom", data=questions, out=tmp_path / "generated"), replica)
    given = [
        "--benchmark",
        "custom",
        "--data",
        questions,
        "--out",
        tmp_path / "scored",
        "--answers",
        tmp_path / "generated" / ANSWERS,
    ]
    done = run_tool("tools/evaluate.py", *given)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["scores"] == generated["scores"] and shown["questions"] == QUESTIONS and shown["model"] == "answers"
    wrong = run_tool("tools/evaluate.py", *given[:-1], tmp_path / "nothing.jsonl")
    assert wrong.returncode == 2 and "nothing.jsonl: cannot be read" in wrong.stderr


def broken_questions(root: Path, *, broken: set[int], count: int = 3) -> Path:
    """Write custom questions, some of them about a picture that ends early."""
    rows = [{"question_id": n, "image": f"{n}.jpg", "text": "What?", "answer": "x"} for n in range(count)]
    write_jsonl(root / "questions.jsonl", rows)
    for number in range(count):
        picture = encode_picture(number)
        (root / f"{number}.jpg").write_bytes(picture[:150] if number in broken else picture)
    return root


def test_broken_picture_does_not_end_an_evaluation(replica: Replica, tmp_path: Path) -> None:
    """The picture is named and counted, has no answer, and is tried again when the same command is started again."""
    data = broken_questions(tmp_path / "data", broken={1})
    content = evaluate(Evaluation("custom", data=data, out=tmp_path / "out"), replica)
    assert (content["questions"], content["answered"], content["complete"]) == (3, 2, False)
    assert content["headline"]["partial"] and "1 of 3 questions have no answer, the first is 1" in content["note"]
    assert (
        f"1 questions failed and are in failed.jsonl, the first is question 1 about {data}/1.jpg: " in content["note"]
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 2]
    [failed] = [json.loads(line) for line in (tmp_path / "out" / FAILED).read_text().splitlines()]
    assert (failed["question_id"], failed["image"]) == (1, f"{data}/1.jpg") and "cannot be" in failed["error"]
    broken_questions(data, broken=set())
    content = evaluate(Evaluation("custom", data=data, out=tmp_path / "out"), replica)
    assert content["complete"] and content["answered"] == 3 and "failed" not in content["note"]
    assert not (tmp_path / "out" / FAILED).exists()


def test_evaluation_ends_when_no_question_can_be_asked(replica: Replica, tmp_path: Path) -> None:
    data = broken_questions(tmp_path / "data", broken={0, 1, 2})
    with pytest.raises(DataError, match=r"custom: no question could be asked; question 0 about .*0.jpg: "):
        evaluate(Evaluation("custom", data=data, out=tmp_path / "out"), replica)
    data = broken_questions(tmp_path / "many", broken=set(range(80)), count=80)
    with pytest.raises(DataError, match=r"the first \d+ questions could not be asked"):
        evaluate(Evaluation("custom", data=data, out=tmp_path / "out2"), replica)


def test_remote_client_goes_on_after_a_broken_picture_and_a_refused_request(tmp_path: Path) -> None:
    data = broken_questions(tmp_path / "data", broken={1}, count=4)
    evaluation = Evaluation("custom", data=data, out=tmp_path / "out")
    numbers = iter(range(4))

    def answer(request: dict, number: int):
        return (400, {}, b"too many pixels") if next(numbers) == 0 else completion("x")

    with serving(answer, key_of=lambda request: b"") as (url, _):
        endpoint = Endpoint(url=url, model="served", concurrency=1)
        client = RemoteClient(ChatClient(endpoint), decoding=evaluation.decoding)
        content = run_benchmark(evaluation, client, model=ModelFacts.of_endpoint(endpoint, name=None), share=DPGroup())
    assert (content["answered"], content["complete"], content["scores"]) == (2, False, {"accuracy": 50.0})
    failed = [json.loads(line) for line in (tmp_path / "out" / FAILED).read_text().splitlines()]
    assert [row["question_id"] for row in failed] == [0, 1] and "too many pixels" in failed[0]["error"]


def test_remote_client_sends_official_request(tmp_path: Path) -> None:
    """The client sends the cropped image and system prompt of the benchmark to the server."""
    WRITERS["qbench", None](tmp_path / "data")
    evaluation = Evaluation("qbench", data=tmp_path / "data", out=tmp_path / "out")
    sent = []

    def answer(request: dict, number: int):
        sent.append(request)
        return completion("A. ")

    with serving(answer, key_of=lambda request: json.dumps(request["messages"]).encode()) as (url, _):
        endpoint = Endpoint(url=url, model="served", concurrency=2)
        client = RemoteClient(ChatClient(endpoint), decoding=evaluation.decoding)
        content = run_benchmark(evaluation, client, model=ModelFacts.of_endpoint(endpoint, name=None), share=DPGroup())
    assert content["headline"]["name"] == "accuracy" and content["model"] == "served"
    assert len(sent) == len(evaluation.items)
    system, user = sent[0]["messages"]
    assert "curious human" in system["content"] and user["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    assert sent[0]["temperature"] == 0 and sent[0]["max_tokens"] == 1024


def test_judged_benchmark_end_to_end(replica: Replica, tmp_path: Path) -> None:
    WRITERS["mm_vet", None](tmp_path / "data")
    evaluation = Evaluation("mm_vet", data=tmp_path / "data", out=tmp_path / "out")
    with serving(
        lambda request, number: completion("0.5"), key_of=lambda request: json.dumps(request["messages"]).encode()
    ) as (url, _):
        judging = Judge(model="another", chat=ChatClient(Endpoint(url=url, model="another")))
        content = evaluate(evaluation, replica, judging=judging)
    assert content["headline"] == {"name": "total", "value": 50.0} and content["judge"]["model"] == "another"
    assert "judge another" in (tmp_path / "out/table.md").read_text(), "incomparable scores name the judge"

"""Judge requests: official prompts, retries, journal, and batch files without an endpoint."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_endpoint import FakeServer, serving
from official_files import WRITERS

from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.evaluate.answers import make_answer
from megatron_share4v.evaluate.judge import (
    JOURNAL,
    REPLIES,
    REQUESTS,
    Judgement,
    collect_judgement,
    resume_instructions,
)
from megatron_share4v.evaluate.judge_prompts import Grade, Request, Review
from megatron_share4v.evaluate.metrics.profile import CORRECTED, OFFICIAL, Profile
from megatron_share4v.evaluate.task import by_id
from megatron_share4v.evaluate.tasks import get_task
from megatron_share4v.remote.openai_client import MAX_RETRY_WAIT_S, ChatClient, Endpoint

Reaction = tuple[int, dict[str, str], bytes]


def completion_reply(text: object, model: str = "another-judge") -> Reaction:
    return (
        200,
        {},
        json.dumps({"model": model, "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode(),
    )


def judging(react: Callable[[dict], Reaction]) -> contextlib.AbstractContextManager[tuple[str, FakeServer]]:
    """Serve replies that depend only on the request, and record all requests."""
    return serving(lambda request, number: react(request), key_of=lambda request: b"")


def chat(url: str, *, waits: list[float] | None = None, **more: object) -> ChatClient:
    return ChatClient(
        Endpoint(url=url, model="judge", **{"concurrency": 3, "retries": 2, **more}),
        sleep=([] if waits is None else waits).append,
    )


def build_requests(name: str, root: Path, answer: str = "A view.") -> tuple[list, dict[str, str], list[Request]]:
    WRITERS[name, None](root)
    task = get_task(name)
    items = task.items(task.open(root))
    texts = by_id(make_answer(item, f"{answer} {item.id}") for item in items)
    return items, texts, list(task.judged.requests(items, texts, OFFICIAL))


def test_llava_bench_request_is_official(tmp_path: Path) -> None:
    _, _, requests = build_requests("llava_bench", tmp_path)
    body = requests[4].body([])
    assert body["messages"][0] == {
        "role": "system",
        "content": "You are a helpful and precise assistant for checking the quality of the answer.",
    }
    assert body["messages"][1]["role"] == "user" and (body["temperature"], body["max_tokens"]) == (0.2, 1024)
    assert body["messages"][1]["content"] == (
        "[Context]\nOne sentence.\nAnother.\n\n[Question]\nTell all.\n\n[Assistant 1]\nReference 4.\n\n[End of "
        "Assistant 1]\n\n"
        "[Assistant 2]\nA view. 4\n\n[End of Assistant 2]\n\n[System]\n"
        "We would like to request your feedback on the performance of two AI assistants in response to the user "
        "question displayed above. "
        "The user asks the question on observing an image. For your reference, the visual content in the image is "
        "represented with a few sentences "
        "describing the image. \nPlease rate the helpfulness, relevance, accuracy, level of details of their "
        "responses. Each assistant receives an "
        "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\nPlease first "
        "output a single line "
        "containing only two values indicating the scores for Assistant 1 and 2, respectively. The two scores are "
        "separated by a space.\nIn the "
        "subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias "
        "and ensuring that the order in "
        "which the responses were presented does not affect your judgment.\n\n"
    )
    assert requests[0].body(["nonsense"]) is None  # never retried


def test_mm_vet_request_is_official(tmp_path: Path) -> None:
    _, _, requests = build_requests("mm_vet", tmp_path)
    first, again = requests[0].body([]), requests[0].body(["about"])
    content = first["messages"][0]["content"]
    assert content.startswith(
        "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> "
        "in the ground"
    )
    assert content.endswith(
        "unexpected contrast between the names of the countries and their actual physical characteristics. | 1.0\n\n"
        "What is x in the equation? | -1 <AND> -5 | A view. 0 | "
    )
    assert (
        "space of the correctness score.\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
        "What is x in the" in content
    )
    assert (
        content.count("\nCan you explain this meme? | ") == 2 and len(content) == 2290 + 1 + 55
    )  # lengths of the published prompt and the question
    assert again["messages"][0]["content"] == content + "\nPredict the correctness of the answer (digit): "
    assert (first["max_tokens"], [message["role"] for message in first["messages"]]) == (3, ["user"])
    heat = [requests[0].body(["about"] * count)["temperature"] for count in range(5)]
    assert heat == [0.0, 0.0, 0.5, 1.0, 1.5] and requests[0].body(["about"] * 5) is None
    assert (
        requests[0].body(["0.5 "]) is None
        and requests[0].body(["x", "1.0"]) is None
        and requests[0].body(["1.1"]) is not None
    )
    assert "1.25 <OR> 5/4" in requests[1].body([])["messages"][0]["content"]
    assert (
        Grade("1", "q", "t", "a").body(["nan"]) is None
        and Grade("1", "q", "t", "a", CORRECTED).body(["nan"]) is not None
    )


def test_llava_bench_end_to_end(tmp_path: Path) -> None:
    items, texts, requests = build_requests("llava_bench", tmp_path)
    replies = {"0": "8 7\nGood.", "1": "8, 7\nA comma and a space: three parts.", "2": "10 5", "3": "9,9", "4": "8.5 9"}
    with judging(
        lambda request: completion_reply(replies[request["messages"][1]["content"].split("A view. ")[1][0]])
    ) as (
        url,
        server,
    ):
        found = collect_judgement(requests, tmp_path / "out", model="judge", chat=chat(url, key="secret"), seed=3)
    assert {(request["model"], request["seed"], request["path"]) for request in server.requests} == {
        ("judge", 3, "/v1/chat/completions")
    }
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"} and len(server.requests) == 5
    assert found == Judgement({name: [text] for name, text in replies.items()}, "judge", ("another-judge",), 3, 5)
    task = get_task("llava_bench")
    folder = task.open(tmp_path)
    scores = task.score(folder, items, [], verdicts=found.verdicts)
    # the unreadable review counts -1 for both: (7 - 1 + 5 + 9 + 9) / (8 - 1 + 10 + 9 + 8.5)
    assert scores.headline == "all" and scores.values["all"] == round(5.8 / 6.9 * 100, 1)
    assert scores.values["all, unreadable reviews"] == 1 and scores.values["llava_bench_complex"] == 50.0
    assert task.score(folder, items, [], verdicts=found.verdicts, profile=CORRECTED).values["all"] == round(
        7.4 / 8.7 * 100, 1
    )
    rows = [
        json.loads(line)
        for line in task.judged.files(items, texts, found.verdicts, "judge")["reviews.jsonl"].splitlines()
    ]
    assert list(rows[1]) == ["id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple"]
    assert (rows[1]["id"], rows[1]["answer1_id"], rows[1]["category"], rows[1]["tuple"]) == (
        2,
        "ref1",
        "llava_bench_detail",
        [-1.0, -1.0],
    )


def test_mm_vet_retries_and_aggregates(tmp_path: Path) -> None:
    items, texts, requests = build_requests("mm_vet", tmp_path)
    stubborn = {"0": ["0.5"], "1": ["The", "1.0 yes"], "2": ["a", "b", "c", "d", "0.7"], "3": ["x"] * 5, "4": ["0.9"]}
    left = {name: list(texts) for name, texts in stubborn.items()}
    with judging(
        lambda request: completion_reply(left[request["messages"][0]["content"].split("A view. ")[1][0]].pop(0))
    ) as (
        url,
        server,
    ):
        found = collect_judgement(requests, tmp_path / "out", model="gpt-4-0613", chat=chat(url))
    assert found.verdicts == stubborn and found.replies == len(server.requests) == 14
    assert (
        sorted(request["temperature"] for request in server.requests) == [0.0] * 8 + [0.5] * 2 + [1.0] * 2 + [1.5] * 2
    )
    task = get_task("mm_vet")
    scores = task.score(task.open(tmp_path), items, [], verdicts=found.verdicts)
    assert scores.values["total"] == scores.values[scores.headline] == 62.0  # (0.5 + 1 + 0.7 + 0 + 0.9) / 5
    assert (scores.values["math"], scores.values["rec"], scores.values["gen"]) == (75.0, 53.3, 90.0)
    assert scores.values["together rec"] == 70.0  # alone, without another capability
    assert scores.values["unreadable grades"] == 1 and not scores.complete
    assert "replies to 1 questions cannot be read: each counts 0 points" in scores.note
    corrected = task.score(task.open(tmp_path), items, [], verdicts=found.verdicts, profile=CORRECTED)
    assert (corrected.values["total"], corrected.values["unreadable grades"]) == (77.5, 1)  # of the four others
    assert "each is left out" in corrected.note
    grades = json.loads(task.judged.files(items, texts, found.verdicts, "j")["mm-vet-grade-1runs.json"])
    assert grades["v1_1"] == {"model": ["j"], "content": ["1.0"], "score": [1.0]} and grades["v1_3"]["score"] == [0.0]


TALKATIVE = ["Rating: 0.5", "0.5/1.0", "I cannot grade this.", "", "five"]
"""Replies of other judges than the official one, none of which the official script can read."""


@pytest.mark.parametrize("profile", [OFFICIAL, CORRECTED], ids=lambda profile: profile.value)
def test_mm_vet_judge_without_a_readable_grade(profile: Profile, tmp_path: Path) -> None:
    items, texts, _ = build_requests("mm_vet", tmp_path)
    task = get_task("mm_vet")
    answers = [make_answer(item, texts[item.id]) for item in items]
    verdicts = {item.id: TALKATIVE for item in items}
    scores = task.score(task.open(tmp_path), items, answers, verdicts=verdicts, profile=profile)
    assert scores.values["unreadable grades"] == 5 and "replies to 5 questions cannot be read" in scores.note
    assert scores.headline == ("total" if profile is OFFICIAL else None) and scores.complete
    assert scores.json_values["total"] == (0.0 if profile is OFFICIAL else None)


def test_unreadable_reviews_are_in_the_note(tmp_path: Path) -> None:
    items, texts, _ = build_requests("llava_bench", tmp_path)
    task = get_task("llava_bench")
    answers = [make_answer(item, texts[item.id]) for item in items]
    verdicts = {item.id: ["8 7" if number else "8, 7"] for number, item in enumerate(items)}
    note = task.score(task.open(tmp_path), items, answers, verdicts=verdicts).note
    assert note == "the judge's replies to 1 questions cannot be read: each counts -1 for both answers"


def test_known_replies_are_not_requested_again(tmp_path: Path) -> None:
    """After a failure, only open requests are sent; other answers or judges cause new requests."""
    _, _, requests = build_requests("mm_vet", tmp_path)
    out = tmp_path / "out"
    broken = threading.Event()

    def sometimes(request: dict) -> Reaction:
        number = request["messages"][0]["content"].split("A view. ")[1][0]
        return (400, {}, b"too long") if number == "3" and not broken.is_set() else completion_reply("0.5")

    with judging(sometimes) as (url, server):
        with pytest.raises(
            DataError,
            match=(
                r"1 of 5 requests got no reply; 3/0/\w+: the endpoint refused: HTTP 400: too long.*replies that came "
                r"are kept"
            ),
        ):
            collect_judgement(requests, out, model="judge", chat=chat(url))
        assert len(server.requests) == 5
        broken.set()
        with (out / JOURNAL).open("a") as file:
            file.write('{"custom_id": "3/0/')
        assert collect_judgement(requests, out, model="judge", chat=chat(url)).replies == 5
        assert len(server.requests) == 6
        assert collect_judgement(requests, out, model="judge", chat=None).replies == 5  # all replies are in the journal
        changed = [Grade("0", "What?", "x", "another answer. A view. 0"), *requests[1:]]
        assert collect_judgement(changed, out, model="judge", chat=chat(url)).replies == 5 and len(server.requests) == 7
        assert (
            collect_judgement(requests, out, model="other", chat=chat(url)).model == "other"
            and len(server.requests) == 12
        )
    journal = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    assert {row["content"] for row in journal} == {"0.5"} and len(journal) == 11


def test_without_an_endpoint_the_requests_are_written_and_replies_are_read(tmp_path: Path) -> None:
    _, _, requests = build_requests("mm_vet", tmp_path)
    out = tmp_path / "out"
    assert collect_judgement(requests, out, model="gpt-4-0613", chat=None) is None
    rows = [json.loads(line) for line in (out / REQUESTS).read_text().splitlines()]
    assert [row["custom_id"].split("/")[:2] for row in rows] == [[str(k), "0"] for k in range(5)]
    assert rows[0]["method"] == "POST" and rows[0]["url"] == "/v1/chat/completions"
    assert rows[0]["body"] == {"model": "gpt-4-0613", **requests[0].body([])}
    message = resume_instructions(out, model="gpt-4-0613")
    assert all(
        part in message
        for part in (str(out / REQUESTS), "--judge-base-url", str(out / REPLIES), "start the same command again")
    )
    # Batch API output in another order, and one line by hand; the reply that is not a number is requested again.
    batch = [
        {
            "id": "b",
            "custom_id": row["custom_id"],
            "error": None,
            "response": {"status_code": 200, "body": json.loads(completion_reply(text, "gpt-4-0613")[2])},
        }
        for row, text in zip(rows[::-1], ["0.1", "0.2", "perhaps", "0.4"])
    ]
    lines = [json.dumps(row) + "\n" for row in (*batch, {"custom_id": rows[0]["custom_id"], "content": "1.0"})]
    (out / REPLIES).write_text("".join(lines))
    assert collect_judgement(requests, out, model="gpt-4-0613", chat=None) is None
    [row] = [json.loads(line) for line in (out / REQUESTS).read_text().splitlines()]
    assert row["custom_id"].startswith("2/1/") and row["body"]["messages"][0]["content"].endswith("(digit): ")
    with (out / REPLIES).open("a") as file:
        file.write(json.dumps({"custom_id": row["custom_id"], "content": "0.3"}) + "\n")
    found = collect_judgement(requests, out, model="gpt-4-0613", chat=None)
    assert found.verdicts == {"0": ["1.0"], "1": ["0.4"], "2": ["perhaps", "0.3"], "3": ["0.2"], "4": ["0.1"]}
    assert found.answered_as == ("gpt-4-0613",)
    (out / REPLIES).write_text('{"custom_id": "0/0/x", "response": {"body": {}}}\n')
    with pytest.raises(DataError, match="judge_replies.jsonl:1: has no reply"):
        collect_judgement(requests, out, model="gpt-4-0613", chat=None)


def test_unavailable_endpoint_stops_early(tmp_path: Path) -> None:
    requests = [Review(str(k), "c", "q", "r", "a") for k in range(60)]
    with (
        judging(lambda request: (503, {}, b"")) as (url, server),
        pytest.raises(DataError, match="got no reply; .*HTTP 503.*, 3 times"),
    ):
        collect_judgement(requests, tmp_path, model="judge", chat=chat(url))
    assert len(server.requests) < 60


@pytest.mark.parametrize("code", [401, 403, 404, 302])
def test_wrong_key_or_path_stops_at_once(code: int, tmp_path: Path) -> None:
    requests = [Review(str(k), "c", "q", "r", "a") for k in range(30)]
    with (
        judging(lambda request: (code, {"Location": "/elsewhere"}, b"no")) as (url, server),
        pytest.raises(ConfigError, match=f"HTTP {code}: .*check URL"),
    ):
        collect_judgement(requests, tmp_path, model="judge", chat=chat(url))
    assert len(server.requests) < 30 and {request["path"] for request in server.requests} == {"/v1/chat/completions"}


BROKEN = [
    (200, {}, b"<html>proxy</html>"), (200, {}, b'{"choices": []}'), completion_reply(None),
    (200, {}, b'[{"choices": 3}]'), (200, {}, b"\xff\xfe" * 10),
    (200, {}, b"[" * 100_000), (200, {"Content-Length": "5000"}, b'{"choices": '), (429, {"Retry-After": "7"}, b"busy"),
    (500, {}, b"oops"), (0, {}, b""),
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken[0]} {broken[2][:12]!r}")
def test_retries_are_bounded(broken: Reaction) -> None:
    reactions, waits = [broken, broken, completion_reply("8 9")], []
    with judging(lambda request: reactions.pop(0)) as (url, server):
        assert chat(url, waits=waits).ask({"messages": []}).text == "8 9"
    assert len(server.requests) == 3 and len(waits) == 2 and all(0 < wait <= MAX_RETRY_WAIT_S for wait in waits)
    assert waits == [7.0, 7.0] if broken[0] == 429 else 1.5 <= waits[1] / 1.0 <= 2.5
    with judging(lambda request: broken) as (url, server), pytest.raises(DataError, match="3 times"):
        chat(url).ask({"messages": []})
    assert len(server.requests) == 3


def test_no_url() -> None:
    with pytest.raises(ConfigError, match="not an http"):
        chat("127.0.0.1:8000/v1")

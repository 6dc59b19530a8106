"""The server's log: a line per request with id and counts, and no floods that a client can cause."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import httpx
import pytest
from server_fixture import Running, data_url, picture, until

from megatron_share4v.serve.request_log import RepeatFilter

CHAT = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 3}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Messages]:
    """Messages of the package's logger."""
    monkeypatch.setattr(logging.getLogger("megatron_share4v"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="megatron_share4v"):
        yield _Messages(caplog)


class _Messages:
    """The messages of a log."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def all(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records]

    def of(self, *answers: httpx.Response) -> list[str]:
        """The lines of requests, once the last one has its line; other tests' requests may still be logged."""
        ids = [answer.headers["x-request-id"] for answer in answers]
        until(lambda: any(ids[-1] in line for line in self.all()))
        return [line for line in self.all() if any(one in line for one in ids)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_per_request(server: Running, lines: _Messages, stream: bool) -> None:
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture())}}, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 3, "n": 2, "stream": stream}
    headers = {"x-request-id": "my-id.7"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=20)
    assert answer.headers["x-request-id"] == "my-id.7" and '"id":"chatcmpl-my-id.7"' in answer.text
    [line] = lines.of(answer)
    prompt = server.engine.requests[0].prompt.token_ids.numel()
    assert re.fullmatch(
        rf"POST /v1/chat/completions 200 request=my-id\.7 client=127\.0\.0\.1 prompt_tokens={prompt} images=1 "
        r"completion_tokens=6 finish=length first_token_ms=\d+ total_ms=\d+",
        line,
    ), line


def test_refused_requests_are_logged_with_their_reason(server: Running, lines: _Messages) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=CHAT | {"n": 0}, headers={"x-request-id": "bad id"}, timeout=20
    )
    made = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made), "an id that could break a log line is replaced"
    [line] = lines.of(answer)
    assert line.startswith("POST /v1/chat/completions 400 ") and "error='n must be an integer from 1 to 128" in line


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "reason"),
    [
        ("GET", "/v1/models", {"host": "evil.example:80"}, 403, '--allowed-hosts evil.example"'),
        ("GET", "/nothing", {}, 404, "/nothing does not exist"),
        ("DELETE", "/health", {}, 405, "DELETE is not a method of /health"),
        ("POST", "/v1/completions", {"content-type": "text/plain"}, 415, "application/json, got 'text/plain'"),
    ],
)
def test_every_refusal_is_logged_with_its_reason(
    server: Running, lines: _Messages, method: str, path: str, headers: dict, status: int, reason: str
) -> None:
    answer = httpx.request(method, server.url + path, headers=headers, timeout=20)
    [line] = lines.of(answer)
    assert (
        answer.status_code == status
        and line.startswith(f"{method} {path} {status} ")
        and reason in line.replace("\\'", "'")
    ), line


def test_an_unexpected_error_has_the_id_of_its_request(
    server: Running, lines: _Messages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of the server")

    monkeypatch.setattr("megatron_share4v.serve.http.parse_object", fail)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=20)
    assert answer.status_code == 500 and "see the server's log" in answer.json()["error"]["message"]
    [line] = lines.of(answer)
    assert line.startswith("POST /v1/chat/completions 500 ")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["POST /v1/chat/completions failed"]


def test_health_and_metrics_are_not_logged(server: Running, lines: _Messages) -> None:
    answers = [httpx.get(f"{server.url}{path}") for path in ("/", "/health", "/metrics", "/load", "/v1/models")]
    answers += [httpx.post(f"{server.url}/ping"), httpx.get(f"{server.url}/nothing%0A{'x' * 300}")]
    [line] = lines.of(*answers)
    assert line.startswith("GET /nothing%0Axxx") and " 404 " in line and len(line) < 1000


def test_floods_are_cut() -> None:
    limit = RepeatFilter(burst=2, period_s=3600)
    records = [logging.makeLogRecord({"msg": "refused %d", "args": (number,)}) for number in range(5)]
    assert [limit.filter(record) for record in records] == [True, True, False, False, False]
    limit._period_s = 0.0
    last = logging.makeLogRecord({"msg": "refused %d", "args": (9,)})
    assert limit.filter(last) and last.getMessage() == "refused 9 (3 more such lines were left out)"

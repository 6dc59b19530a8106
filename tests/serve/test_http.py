"""HTTP layer: disconnects, error shape, key, limits, health, metrics, page headers, Megatron-LM's route."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from server_fixture import FakeEngine, FakeLimits, Running, data_url, picture, running, until

from megatron_share4v.data.loading.encode import Encoder

CHAT = {"messages": [{"role": "user", "content": "What is it?"}]}


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api"])
def test_disconnect_cancels(encoder: Encoder, path: str, stream: bool) -> None:
    engine = FakeEngine(encoder, limits=FakeLimits(max_requests=1), step_s=0.02)
    with running(encoder, engine=engine) as server:
        host, port = server.url.removeprefix("http://").split(":")
        asked = {
            "/v1/chat/completions": CHAT | {"stream": stream, "max_tokens": 300, "ignore_eos": True},
            "/v1/completions": {"prompt": "a", "stream": stream, "max_tokens": 300, "ignore_eos": True},
            "/api": {"prompts": ["a"], "tokens_to_generate": 300},
        }
        body = httpx.Request("PUT", server.url, json=asked[path]).content
        method = "PUT" if path == "/api" else "POST"
        lines = (
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        clients = [socket.create_connection((host, int(port))) for _ in range(2)]
        clients[0].sendall(head + body)
        until(lambda: engine.running and server.worker.waiting == 0)
        clients[1].sendall(head + body)
        until(lambda: server.worker.waiting == 1)
        clients[1].close()  # cancel the waiting request first, then the running one
        until(lambda: server.worker.waiting == 0)
        assert engine.running and not engine.cancelled
        start = time.monotonic()
        clients[0].close()
        until(lambda: not engine.running)
        assert time.monotonic() - start < 5  # 0.05 s on an idle machine, and an answer of 300 tokens takes 6
        metrics = server.app.state.metrics
        assert metrics.value("request_success_total", finished_reason="abort") == 2


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/responses", 404, "/v1/responses does not exist"),
        ("POST", "/v1/messages", 404, "does not exist"),
        ("GET", "/v1/chat/completions", 405, "GET is not a method of /v1/chat/completions"),
        ("POST", "/v1/models/", 405, "POST is not a method"),
        ("DELETE", "/", 405, "DELETE is not a method"),
        ("POST", "/v1/chat/completions", 415, "content-type must be application/json"),
    ],
)
def test_errors_have_openai_shape(http: httpx.Client, method: str, path: str, status: int, words: str) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status and answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"] and error["code"] == status


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "an array of 1 to 1024 values, got an array of 0"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0]", "take turns, a user first"),
        ({"messages": [*CHAT["messages"], *CHAT["messages"]]}, "messages[1]", "take turns"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
            "messages[0].content[0].type",
            "text or image_url, got 'video_url'",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "half a surrogate pair"),
        ({"temperature": "hot"}, "temperature", "a number from 0 to 100, got 'hot'"),
        ({"n": True}, "n", "an integer from 1 to 128, got true"),
        ({"max_tokens": 0}, "max_tokens", "an integer from 1, got 0"),
        ({"max_tokens": 10**30}, "max_tokens", "an integer from 1, got an integer of more than 64 bits"),
        ({"stop": ["a"] * 5}, "stop", "an array of 0 to 4 values, got an array of 5"),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"stop": "\ud800"}, "stop", "half a surrogate pair"),
        ({"stop": ["a", "\ud800"]}, "stop[1]", "half a surrogate pair"),
        ({"top_logprobs": 3}, "logprobs", "true where top_logprobs is given"),
        ({"stream_options": {}}, "stream_options", "stream: true only"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "size of the vocabulary"),
        ({"seed": 10**30}, "seed", "more than 64 bits"),
    ],
)
def test_invalid_fields_are_named(http: httpx.Client, change: dict, param: str | None, words: str) -> None:
    import json

    answer = http.post(
        "/v1/chat/completions", content=json.dumps(CHAT | change), headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error


def test_inert_and_unknown_fields_are_accepted(http: httpx.Client) -> None:
    change = {
        "tools": [],
        "response_format": {"type": "text"},
        "logit_bias": None,
        "user": "me",
        "store": True,
        "max_tokens": 2,
        "best_of": 1,
    }
    assert http.post("/v1/chat/completions", json=CHAT | change).status_code == 200


def test_api_key_protects_all_but_health_and_page(encoder: Encoder) -> None:
    with running(encoder, api_key="sésame".encode().hex()) as server, httpx.Client(base_url=server.url) as http:
        key = server.config.api_key
        for path in ("/v1/models", "/metrics", "/version", "/tokenizer_info", "/nothing"):
            for header in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": f"Basic {key}"},
                {"authorization": key},
            ):
                answer = http.get(path, headers=header)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == 401, (path, header)
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 401
        for path in ("/", "/health", "/ping", "/favicon.ico"):
            assert http.get(path).status_code == 200
        assert http.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_large_bodies_are_rejected_before_reading(encoder: Encoder) -> None:
    with running(encoder, max_body_bytes=100_000, max_buffered_bytes=150_000) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100001\r\n\r\n"
            )
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")
        chunks = (b'"' + b"x" * 50_000 for _ in range(4))
        answer = httpx.post(f"{server.url}/tokenize", content=chunks, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == 413
        with socket.create_connection((host, int(port))) as first:
            first.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 99000\r\n\r\n" + b" " * 90_000
            )
            until(lambda: server.app.state.bodies.buffered == 90_000)
            answer = httpx.post(
                f"{server.url}/tokenize", content=b" " * 70_000, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 429 and answer.headers["retry-after"]
        until(lambda: server.app.state.bodies.buffered == 0)
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 200


def test_health_while_loading_and_after(encoder: Encoder) -> None:
    with running(encoder, load_s=2.0, wait=False) as server, httpx.Client(base_url=server.url) as http:
        until(lambda: server.http.started)
        answer = http.get("/health")
        assert answer.status_code == 503 and answer.json() == {"status": "loading"} and answer.headers["retry-after"]
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 503
        assert http.get("/").status_code == 200 and http.get("/metrics").status_code == 200
        until(lambda: http.get("/health").status_code == 200, timeout_s=60)
        assert http.get("/health").json() == http.post("/ping").json() == {"status": "ok"}
        assert http.get("/load").json() == {"server_load": 0}


def test_metric_names_and_values(encoder: Encoder) -> None:
    with running(encoder, model_name='a"b') as server, httpx.Client(base_url=server.url) as http:
        http.post("/v1/chat/completions", json=CHAT | {"n": 2})
        http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 1})
        http.get("/nothing")
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        samples = (re.fullmatch(r"(share4v_\w+\{.*\}) (\S+)", line).groups() for line in lines)
        values = {name: float(value) for name, value in samples}
        label = 'model_name="a\\"b"'
        expected = [
            "num_requests_running",
            "num_requests_waiting",
            "prompt_tokens_total",
            "generation_tokens_total",
            "kv_cache_usage_perc",
            "image_cache_queries_total",
            "image_cache_hits_total",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
        ]
        assert all(f"share4v_{name}{{{label}}}" in values for name in expected)
        assert values[f'share4v_request_success_total{{finished_reason="stop",{label}}}'] == 2
        assert values[f'share4v_request_success_total{{finished_reason="length",{label}}}'] == 1
        assert values[f'share4v_http_refused_total{{{label},status="404"}}'] == 1
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert values[f"share4v_{name}_count{{{label}}}"] == 3
            assert values[f'share4v_{name}_bucket{{le="+Inf",{label}}}'] == 3
        tokens = values[f"share4v_generation_tokens_total{{{label}}}"]
        assert values[f"share4v_inter_token_latency_seconds_count{{{label}}}"] == tokens - 3


def test_page_content_security_policy(http: httpx.Client) -> None:
    answer = http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert (
        policy["default-src"] == "'none'"
        and policy["connect-src"] == "'self'"
        and policy["frame-ancestors"] == "'none'"
    )
    [script] = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    assert policy["script-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+|(?<=\")v1/\S+", "", answer.text), "no URL of another origin"
    assert not re.search(r"\sstyle=|\son\w+=|innerHTML|eval\(", answer.text)
    assert http.get("/favicon.ico").headers["content-type"] == "image/svg+xml"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_tokenize_and_detokenize(http: httpx.Client, encoder: Encoder) -> None:
    answer = http.post("/tokenize", json={"prompt": "Three boats", "return_token_strs": True}).json()
    assert (
        answer["tokens"] == [1, *encoder.tokenizer.encode("Three boats")]
        and answer["count"] == len(answer["tokens"])
        and answer["max_model_len"] == 512
    )
    assert answer["token_strs"][0] == "<s>" and "".join(answer["token_strs"][1:]) == " Three boats"
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "<s>Three boats"}
    assert http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False}).json()[
        "tokens"
    ] == encoder.tokenizer.encode("a")
    tokenized = http.post("/tokenize", json=CHAT).json()
    assert tokenized["count"] == http.post("/v1/chat/completions", json=CHAT).json()["usage"]["prompt_tokens"]
    assert http.get("/tokenizer_info").json()["template"] == "vicuna_v1" and http.get("/version").json()["version"]


def test_megatron_route(http: httpx.Client, server: Running, encoder: Encoder) -> None:
    server.engine.answer = lambda engine, request: "boats.\nTwo"
    body = {"prompts": ["Three", "Five"], "tokens_to_generate": 40, "logprobs": True, "top_k": 1, "add_BOS": True}
    answer = http.put("/api", json=body).json()
    assert answer["text"] == ["Three boats.\nTwo", "Five boats.\nTwo"]
    assert answer["tokens"][0] == [1, *encoder.tokenizer.encode("Three"), *encoder.tokenizer.encode("boats.\nTwo")]
    assert [len(row) for row in answer["logprobs"]] == [len(row) - 1 for row in answer["tokens"]]
    assert "".join(answer["segments"][0]) == "<s> Three boats.\nTwo"
    assert server.engine.requests[0].sampling.temperature == 0.0
    assert http.put("/api", json={"prompts": ["Three"], "stop_on_eol": True}).json()["text"] == ["Three boats.\n"]
    answer = http.put("/api", json={"prompts": ["Three boats"], "tokens_to_generate": 0, "logprobs": True}).json()
    assert answer["text"] == ["Three boats"] and len(answer["logprobs"][0]) == len(answer["tokens"][0]) - 1
    image = {"prompts": ["USER: <image>\nWhat? ASSISTANT:"], "images": [[data_url(picture())]], "add_BOS": True}
    assert http.put("/api", json=image).json()["logprobs"] is None
    assert server.engine.requests[-1].prompt.image_slots.numel() == 16
    for change, param in (
        ({"max_len": 5}, "max_len"),
        ({"beam_width": 2}, "beam_width"),
        ({"top_p_bound": 0.5}, "top_p_bound"),
        ({"temperature": 0}, "temperature"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [""]}, "prompts"),
        ({"tokens_to_generate": 0}, "tokens_to_generate"),
        ({"images": [["data:x"]]}, "images[0]"),
        ({"random_seed": -1}, "random_seed"),
    ):
        refused = http.put("/api", json={"prompts": ["a"]} | change)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param, (
            change,
            refused.text,
        )


def test_open_host_without_key_warns(encoder: Encoder) -> None:
    from megatron_share4v.config.serve import ServeConfig

    assert (
        ServeConfig(host="0.0.0.0").is_open
        and not ServeConfig(host="0.0.0.0", api_key="x").is_open
        and not ServeConfig().is_open
    )
    with pytest.raises(ValueError, match="printable ASCII"):
        ServeConfig(api_key=" ")

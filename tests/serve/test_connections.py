"""Connections: idle, slow and stalled clients cannot make the server deaf; small packets are not delayed."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server_fixture import FakeEngine, Running, running, until

from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.connection import RESERVED_FILES, fit_connections, report_loop_error
from megatron_share4v.serve.http import SMALL_BODY
from megatron_share4v.serve.json_fields import MAX_DEPTH, MAX_VALUES, parse_object

BODY = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 300, "ignore_eos": True}


@pytest.fixture
def crowded(encoder: Encoder) -> Iterator[Running]:
    """A server that keeps eight connections."""
    with running(encoder, engine=FakeEngine(encoder, step_s=0.01), max_connections=8, header_timeout_s=60.0) as server:
        yield server


def connect(server: Running, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)
    connection.sendall(data)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


HALF_HEADER = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-"
HALF_BODY = HALF_HEADER + b"Type: application/json\r\nContent-Length: 100\r\n\r\n{"


@pytest.mark.parametrize("data", [b"", HALF_HEADER, HALF_BODY])
def test_idle_clients_do_not_keep_others_out(crowded: Running, data: bytes) -> None:
    idle = [connect(crowded, data) for _ in range(40)]
    until(lambda: sum(map(is_closed, idle)) >= 32, timeout_s=30)
    assert httpx.get(f"{crowded.url}/health", timeout=20).status_code == 200
    assert not is_closed(idle[-1]), "the longest idle connections are closed first"
    assert len(crowded.http.server_state.connections) <= 8
    for connection in idle:
        connection.close()


def test_running_answers_are_not_closed_for_others(crowded: Running) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = [
            clients.submit(httpx.post, f"{crowded.url}/v1/chat/completions", json=BODY, timeout=60) for _ in range(8)
        ]
        crowded.engine.step_s = 0.2  # slow, until the refusal has come
        until(lambda: len(crowded.engine.running) == 8, timeout_s=30)
        refused = httpx.get(f"{crowded.url}/health", timeout=20)
        assert refused.status_code == 503 and "8 connections are being answered" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        crowded.engine.step_s = 0.0
        assert [answer.result().json()["usage"]["completion_tokens"] for answer in answers] == [300] * 8


@pytest.mark.parametrize("data", [b"", HALF_HEADER, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"])
def test_a_slow_header_ends_the_connection(encoder: Encoder, data: bytes) -> None:
    with running(encoder, header_timeout_s=1.5, idle_timeout_s=3) as server:
        connection = connect(server, data)
        received = bytearray()
        while part := connection.recv(1 << 16):
            received += part
        assert received.startswith(b"HTTP/1.1 200") if b"\r\n\r\n" in data else not received
        until(lambda: not server.http.server_state.connections)


def test_a_client_that_does_not_read_is_disconnected(encoder: Encoder) -> None:
    engine = FakeEngine(encoder)
    engine.answer = lambda engine, request: "word " * 100
    with running(encoder, engine=engine, write_timeout_s=0.5, max_choices=2000, max_waiting=2000) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        body = json.dumps(BODY | {"stream": True, "n": 128, "logprobs": True, "top_logprobs": 20}).encode()
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
        until(lambda: engine.requests, timeout_s=20)
        until(lambda: not server.http.server_state.connections, timeout_s=30)
        connection.close()


def test_small_packets_are_not_delayed(server: Running) -> None:
    connection = connect(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    [mine] = [
        other
        for other in server.http.server_state.connections
        if other.transport.get_extra_info("peername") == connection.getsockname()
    ]
    peer = mine.transport.get_extra_info("socket")
    assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    connection.close()


def test_connections_fit_the_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"soft": 1024, "hard": 1024}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.update(soft=pair[0]))
    assert fit_connections(1000) == 1024 - RESERVED_FILES
    limits["hard"] = 100_000
    assert fit_connections(1000) == 1000 and limits["soft"] == 1000 + RESERVED_FILES
    limits.update(soft=64, hard=64)
    assert fit_connections(1000) == 16
    limits.update(soft=resource.RLIM_INFINITY, hard=resource.RLIM_INFINITY)
    assert fit_connections(1000) == 1000


def test_failed_accepts_are_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_share4v"), "propagate", True)
    loop = asyncio.new_event_loop()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            error = OSError(24, "Too many open files")
            report_loop_error(loop, {"message": "socket.accept() out of system resource", "exception": error})
    loop.close()
    assert all(
        record.getMessage() == "cannot accept connections: [Errno 24] Too many open files" and not record.exc_info
        for record in caplog.records
    )
    assert len(caplog.records) == 3


def test_large_bodies_are_parsed_off_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def noted(body: bytes):
        threads.append(threading.current_thread().name)
        return parse_object(body)

    monkeypatch.setattr("megatron_share4v.serve.http.parse_object", noted)
    for size in (10, SMALL_BODY + 1):
        httpx.post(f"{server.url}/tokenize", json={"prompt": "a" * size}, timeout=20)
    assert not threads[0].startswith("parse") and threads[1].startswith("parse")


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_nested_bodies_are_refused(opening: bytes, closing: bytes) -> None:
    fits = MAX_DEPTH - 1
    assert parse_object(b'{"a":' + opening * fits + b"1" + closing * fits + b"}").values
    for depth in (MAX_DEPTH, 900, 100_000):
        with pytest.raises(ApiError, match=f"nested too deeply: accepted are {MAX_DEPTH} levels"):
            parse_object(b'{"a":' + opening * depth + b"1" + closing * depth + b"}")


def test_bodies_of_many_values_are_refused_before_parsing() -> None:
    body = b'{"a":[' + b"0," * MAX_VALUES + b"0]}"
    start = time.thread_time()
    with pytest.raises(ApiError, match="brackets and commas; accepted are") as caught:
        parse_object(body)
    assert caught.value.status == 413 and time.thread_time() - start < 0.5

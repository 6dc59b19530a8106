"""Thousands of malformed requests: no 5xx but 503, no hang, no leak, no fetch from private addresses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx
import psutil
import pytest
from malformed_requests import RawRequest, chat, exchange, generate, post
from server_fixture import running, until

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.errors import ConfigError
from megatron_share4v.serve.server import serve

REQUESTS, CLIENTS, TIMEOUT_S = 1600, 12, 20.0
MAX_GROWTH_BYTES = 64 << 20  # memory that allocators may keep; one leaked body or decoded image would be 60 MB or more


@contextlib.contextmanager
def process(directory: Path, *settings: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server in its own process, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = Path(__file__).resolve().parents[1] / "fake_server.py"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(script), str(directory), f"port={port}", *settings]
    with open(directory / "server.txt", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert server.poll() is None and time.monotonic() < deadline, (directory / "server.txt").read_text()
            time.sleep(0.05)
        yield server, port
    finally:
        server.kill()
        server.wait()


def send_generated(port: int, *, seed: int, count: int) -> Counter:
    """Send generated requests from several clients; returns the count of each status."""
    seen: Counter = Counter()

    def one(number: int) -> None:
        raw = generate(Random(f"{seed}/{number}"))
        try:
            got = exchange(port, raw, timeout_s=TIMEOUT_S)
        except ConnectionResetError:
            seen["reset"] += 1
            return
        except (TimeoutError, IndexError, ValueError) as error:
            raise AssertionError(
                f"request {number} of seed {seed} got no answer ({error!r}): {raw.data[:300]!r}"
            ) from error
        if got is None:
            seen["aborted"] += 1
            return
        status, body = got
        seen[status] += 1
        assert status < 500 or status == 503, (seed, number, status, body[:300], raw.data[:300])
        if status >= 400 and raw.kind not in ("head", "not http") and b"Invalid HTTP" not in body:
            error = json.loads(body)["error"]
            assert (
                set(error) == {"message", "type", "param", "code"}
                and error["code"] in (status, "context_length_exceeded")
                and error["message"]
            ), (seed, number, body)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(one, number) for number in range(count)]:
            done.result()
    return seen


def test_generated_requests(tmp_path: Path) -> None:
    with process(tmp_path, "body_timeout_s=2.0", "max_body_bytes=4000000") as (server, port):
        memory = psutil.Process(server.pid).memory_info
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=chat() | {"temperature": 0}).json()[
            "choices"
        ]
        send_generated(port, seed=1, count=REQUESTS // 5)
        before = memory().rss
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for number, connection in enumerate(slow):
            connection.sendall(post("/v1/completions", b"x" * 100).data[: 40 + 5 * number])
        seen = send_generated(port, seed=2, count=REQUESTS)
        for connection in slow:
            connection.close()
        assert (
            seen[200] > REQUESTS / 20
            and seen[400] > REQUESTS / 4
            and seen[413]
            and seen[415]
            and seen[404]
            and seen[405]
        ), seen
        assert seen["reset"] < REQUESTS / 50, seen
        deadline = time.monotonic() + 10
        while True:
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            left = [
                line
                for line in metrics.splitlines()
                if line.startswith(("share4v_num_requests_running", "share4v_num_requests_waiting"))
            ]
            if all(float(line.split()[-1]) == 0 for line in left) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        assert len(left) == 2 and all(float(line.split()[-1]) == 0 for line in left), left
        assert (
            httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=chat() | {"temperature": 0}).json()[
                "choices"
            ]
            == answer
        )
        assert memory().rss - before < MAX_GROWTH_BYTES, (before, memory().rss)
        log = (tmp_path / "server.txt").read_text()
        assert "Traceback" not in log, log[-3000:]


def test_slow_body_times_out(encoder: Encoder) -> None:
    with running(encoder, body_timeout_s=0.3) as server:
        data = post("/v1/chat/completions", b"x" * 1000).data[:-10]
        start = time.monotonic()
        status, body = exchange(int(server.url.rpartition(":")[2]), RawRequest(data), timeout_s=10)
        assert status == 408 and json.loads(body)["error"]["code"] == 408 and time.monotonic() - start < 5


PRIVATE_URLS = [
    "http://127.0.0.1:{port}/a.png",
    "http://localhost:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f.1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://127.1:{port}/",
    "http://[::]:{port}/",
    "http://user:pass@127.0.0.1:{port}/",
    "HTTP://LOCALHOST:{port}/",
    "http://localhost.:{port}/",
    "http://127.0.0.1:{port}#@example.com/",
    "http://example.com@127.0.0.1:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
]


@pytest.mark.parametrize("allowed", [None, (), ("localhost",)])
def test_private_addresses_are_never_fetched(encoder: Encoder, allowed: tuple[str, ...] | None) -> None:
    visits: list[bytes] = []
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:

        def watch() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    visits.append(connection.recv(100))
                    connection.close()

        threading.Thread(target=watch, daemon=True).start()
        port = listener.getsockname()[1]
        with (
            running(encoder, allow_image_urls=allowed, image_timeout_s=1.0) as server,
            httpx.Client(timeout=20) as client,
        ):
            for url in PRIVATE_URLS:
                got = client.post(f"{server.url}/v1/chat/completions", json=chat(url.format(port=port)))
                assert got.status_code == 400, (url, got.text)
                assert "messages[0]" in got.json()["error"]["param"]
        assert visits == []
        with socket.create_connection(("127.0.0.1", port)) as probe:
            probe.sendall(b"probe")
        until(lambda: visits)  # shows that the listener detects connections


def test_sigterm_drains_running_answers(tmp_path: Path) -> None:
    with process(tmp_path, "step_s=0.01", "drain_s=20") as (server, port), ThreadPoolExecutor(1) as pool:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100}
        answer = pool.submit(httpx.post, f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=20)
        time.sleep(0.4)
        server.send_signal(signal.SIGTERM)
        assert answer.result().json()["usage"]["completion_tokens"] == 100
        assert server.wait(20) == 0
        assert (tmp_path / "server.txt").read_text().endswith("stopped\n")


def test_sigterm_drain_timeout(tmp_path: Path) -> None:
    with process(tmp_path, "step_s=0.05", "drain_s=0.5") as (server, port), ThreadPoolExecutor(1) as pool:
        url, body = (
            f"http://127.0.0.1:{port}/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 400},
        )
        whole = pool.submit(httpx.post, url, json=body, timeout=20)
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=20) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert server.wait(20) == 0
        assert whole.result().status_code == 503 and "stopping" in whole.result().json()["error"]["message"]
        assert "Traceback" not in (tmp_path / "server.txt").read_text()


def test_failing_engine_ends_the_server_with_its_traceback(tmp_path: Path) -> None:
    with process(tmp_path, "breaks_after=1") as (server, port):
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=20).status_code == 200
        assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=20).status_code == 503
        assert server.wait(20) == 1
        log = (tmp_path / "server.txt").read_text()
        assert "RuntimeError: a rank has died" in log and "in step" in log


def test_port_in_use_is_a_user_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"host 127.0.0.1, port {port}: cannot listen there"):
            serve(ServeConfig(port=port), lambda: pytest.fail("nothing is loaded"))

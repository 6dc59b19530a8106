"""Attack a server of this machine as hostile clients do, and time honest requests beside it.

python tools/bench_attacks.py CKPT     starts tools/serve.py with `ulimit -n 1024`

Three rows of JSON: JPEGs of thousands of scans beside text and image requests; 1,050 idle connections beside /health;
the first token on a kept connection against one that closes. Exit code 1 when a bound is exceeded.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

from PIL import Image

from megatron_share4v.errors import exit_on_closed_output

ROOT = Path(__file__).resolve().parents[1]
OPEN_FILES, IDLE = 1024, 1050
HONEST_S, KEPT_S = 1.0, 0.003
"""Bounds: an honest request beside an attack, and the delay of a kept connection's first token."""
START_S, ANSWER_S = 300.0, 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--attackers", type=int, default=4, help="clients that send images at the same time")
    parser.add_argument("--rounds", type=int, default=20, help="honest requests of each kind")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running_server(arguments.checkpoint) as port:
        rows = [
            attack_with_scans(port, attackers=arguments.attackers, rounds=arguments.rounds),
            attack_with_idle_connections(port, rounds=arguments.rounds),
            compare_connections(port, rounds=arguments.rounds),
        ]
    for row in rows:
        print(json.dumps(row), flush=True)
    return 0 if all(row["passed"] for row in rows) else 1


@contextlib.contextmanager
def running_server(checkpoint: Path) -> Iterator[int]:
    """Run the server on a free port, with few open files; yields the port when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = f'ulimit -n {OPEN_FILES}; exec "$0" "$@"'
    serve = [sys.executable, str(ROOT / "tools/serve.py"), str(checkpoint), "--port", str(port)]
    server = subprocess.Popen(["bash", "-c", command, *serve])
    try:
        deadline = time.monotonic() + START_S
        while not is_healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("the server did not become ready")
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(60)


def connect(port: int) -> HTTPConnection:
    """A new connection to the server."""
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    connection.connect()
    return connection


def is_healthy(port: int) -> bool:
    """Whether /health answers 200 on a new connection."""
    try:
        with contextlib.closing(connect(port)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


def ask(connection: HTTPConnection, body: object, *, close: bool = False) -> tuple[int, float]:
    """Status of one chat, and seconds to the first token of a stream (or to the end)."""
    headers = {"Content-Type": "application/json"} | ({"Connection": "close"} if close else {})
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    events = [time.perf_counter() - start for line in response if line.startswith(b"data: ")]
    # The first event of a stream has the role, the second the first token.
    return response.status, events[1] if len(events) > 1 else time.perf_counter() - start


def chat(*, image: bytes | None = None, stream: bool = False) -> dict:
    """A short question, about an image or not."""
    parts: list[dict] = [{"type": "text", "text": "What is shown?"}]
    if image is not None:
        url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    message = {"role": "user", "content": parts}
    return {"messages": [message], "max_tokens": 4, "temperature": 0, "stream": stream, "ignore_eos": True}


def encode_jpeg(side: int, **options: object) -> bytes:
    """A gray square."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", **options)
    return file.getvalue()


def scan_bomb(*, size: int, side: int = 2000) -> bytes:
    """A progressive JPEG of about `size` bytes: its last scan, a few bytes, is repeated."""
    data = encode_jpeg(side, progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (size // len(last)) + data[-2:]


def timed(port: int, body: object) -> tuple[int, float]:
    """Status and seconds of one chat on a new connection."""
    start = time.perf_counter()
    with contextlib.closing(connect(port)) as connection:
        status, _ = ask(connection, body, close=True)
    return status, time.perf_counter() - start


def attack_with_scans(port: int, *, attackers: int, rounds: int) -> dict:
    """Send bombs without pause beside honest requests."""
    bomb, done, refused = chat(image=scan_bomb(size=600_000)), threading.Event(), []

    def attack() -> None:
        while not done.is_set():
            refused.append(timed(port, bomb)[0])

    threads = [threading.Thread(target=attack) for _ in range(attackers)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    text = [timed(port, chat()) for _ in range(rounds)]
    image = [timed(port, chat(image=encode_jpeg(400))) for _ in range(rounds)]
    done.set()
    for thread in threads:
        thread.join()
    honest = text + image
    return {
        "attack": f"{len(refused)} JPEGs of 600 kB in scans, {attackers} at a time",
        "statuses": sorted(set(refused)),
        "honest_statuses": sorted({status for status, _ in honest}),
        "text_max_s": round(max(seconds for _, seconds in text), 3),
        "image_max_s": round(max(seconds for _, seconds in image), 3),
        "passed": set(refused) == {400} and all(status == 200 and seconds < HONEST_S for status, seconds in honest),
    }


def attack_with_idle_connections(port: int, *, rounds: int) -> dict:
    """Hold idle connections beside /health."""
    idle = [socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) for _ in range(IDLE)]
    seconds, healthy = [], True
    for _ in range(rounds):
        start = time.perf_counter()
        healthy &= is_healthy(port)
        seconds.append(time.perf_counter() - start)
    for connection in idle:
        connection.close()
    worst = max(seconds)
    attack = f"{IDLE} idle connections, ulimit -n {OPEN_FILES}"
    passed = healthy and worst < HONEST_S
    return {"attack": attack, "healthy": healthy, "health_max_s": round(worst, 3), "passed": passed}


def compare_connections(port: int, *, rounds: int) -> dict:
    """Seconds to the first token on a kept connection and on new ones, in turns."""
    kept, closing = [], []
    body = chat(stream=True)
    with contextlib.closing(connect(port)) as connection:
        for _ in range(rounds):
            kept.append(ask(connection, body)[1])
            with contextlib.closing(connect(port)) as other:
                closing.append(ask(other, body, close=True)[1])
    medians = statistics.median(kept), statistics.median(closing)
    return {
        "attack": "none: first token",
        "kept_s": round(medians[0], 4),
        "closing_s": round(medians[1], 4),
        "passed": medians[0] < medians[1] + KEPT_S,
    }


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())

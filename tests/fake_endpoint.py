"""Fake chat completions server for captioning and evaluation, with injectable faults."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def completion(text: str, *, tokens: int = 4, finish: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body = {"choices": [choice], "usage": {"completion_tokens": tokens}}
    return 200, {}, json.dumps(body).encode()


def caption_of(request: dict[str, Any]) -> Answer:
    """A caption computed from the image's bytes."""
    return completion(f" caption {sum(image_of(request))} ")


def image_of(request: dict[str, Any]) -> bytes:
    return base64.b64decode(request["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])


class FakeServer:
    """Records requests and answers them with answer(request, number).

    number counts the attempts for the same image (or `key_of` value) from 0. HANG_UP closes the connection without a
    response.
    """

    HANG_UP: Answer = (0, {}, b"")

    def __init__(
        self, answer: Callable[[dict[str, Any], int], Answer], key_of: Callable[[dict[str, Any]], bytes]
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self._tries: dict[bytes, int] = {}
        self._lock, self._answer, self._key_of = threading.Lock(), answer, key_of

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.requests.append({"path": handler.path, **request})
            self.headers.append(dict(handler.headers))
            number = self._tries.get(self._key_of(request), 0)
            self._tries[self._key_of(request)] = number + 1
        code, headers, body = self._answer(request, number)
        with self._lock:
            self._at_once -= 1
        if not code:
            return
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


@contextlib.contextmanager
def serving(
    answer: Callable[[dict[str, Any], int], Answer], *, key_of: Callable[[dict[str, Any]], bytes] = image_of
) -> Iterator[tuple[str, FakeServer]]:
    """Serve in a thread; yields the URL up to /v1."""
    fake = FakeServer(answer, key_of)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fake.handle(self)

        def log_message(self, *arguments: object) -> None:
            """Keep the test output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

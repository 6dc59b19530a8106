"""The server's log: one line per request with its id and counts, and a limit on lines that any client can cause."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from megatron_share4v.logging import get_logger
from megatron_share4v.serve.generation import Generation
from megatron_share4v.serve.http import OPEN_PATHS, RECORD

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_FOREIGN = ("uvicorn.error", "asyncio")


@dataclass
class RequestRecord:
    """What the log says about one request, filled while it is answered. generation: None for other routes."""

    id: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    error: str | None = None
    generation: Generation | None = None

    def counts(self) -> str:
        """Counts and times as `name=value` words."""
        words: dict[str, object] = {} if self.generation is None else self.generation.summary()
        words["total_ms"] = round((time.monotonic() - self.started) * 1000)
        if self.error is not None:
            words["error"] = repr(self.error[:300])
        return " ".join(f"{name}={value}" for name, value in words.items())


class RequestLog:
    """Outermost ASGI middleware: gives each request an id, sent back as X-Request-Id, and logs a line at its end.

    A client may choose the id with the same header. Successful requests for the page, health and metrics (GET, and
    POST /ping) are not logged.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[RECORD] = RequestRecord(_request_id(scope))

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            refused = record.status >= 400
            if refused or (scope["method"] in ("POST", "PUT") and scope["path"] not in OPEN_PATHS):
                client = (scope.get("client") or ("-",))[0]
                path = scope["raw_path"].decode("ascii", "backslashreplace")[:200]
                log = get_logger().getChild("refused") if refused else get_logger()
                status = record.status or "disconnected"
                log.info(
                    "%s %s %s request=%s client=%s %s",
                    scope["method"][:20], path, status, record.id, client, record.counts(),
                )  # fmt: skip


def _request_id(scope: Any) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    text = given.decode("ascii", "replace")
    return text if _ID.fullmatch(text) else uuid.uuid4().hex


class RepeatFilter(logging.Filter):
    """Logging filter that passes `burst` records in `period_s` seconds and counts the rest in the next one."""

    def __init__(self, *, burst: int, period_s: float) -> None:
        super().__init__()
        self._burst, self._period_s = burst, period_s
        self._start, self._passed, self._dropped = -period_s, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide on one record."""
        now = time.monotonic()
        if now - self._start >= self._period_s:
            if self._dropped:
                record.msg = f"{record.msg} ({self._dropped} more such lines were left out)"
            self._start, self._passed, self._dropped = now, 0, 0
        self._passed += 1
        if self._passed > self._burst:
            self._dropped += 1
            return False
        return True


def limit_log() -> None:
    """Limit the lines that any client can cause: refused requests, failed accepts, and those of uvicorn and asyncio."""
    log = get_logger()
    log.getChild("refused").filters = [RepeatFilter(burst=20, period_s=1.0)]
    log.getChild("accept").filters = [RepeatFilter(burst=1, period_s=60.0)]
    for name in _FOREIGN:
        foreign = logging.getLogger(name)
        foreign.filters = [RepeatFilter(burst=10, period_s=10.0)]
        if log.handlers:  # with the time, like all other lines
            foreign.handlers, foreign.propagate = log.handlers, False

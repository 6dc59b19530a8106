"""HTTP layer below the routes: size-limited bodies, disconnect detection, server-sent events, OpenAI's error shape."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.logging import get_logger
from megatron_share4v.serve.api_error import ApiError, unavailable_error
from megatron_share4v.serve.json_fields import JsonFields, parse_object
from megatron_share4v.serve.metrics import Metrics
from megatron_share4v.serve.responses import to_json

T = TypeVar("T")
# The page exposes no model data, and a browser cannot send a key before loading it.
OPEN_PATHS = ("/", "/health", "/ping", "/favicon.ico")
BODY_READ = "share4v.body_read"  # set in a request's scope
RECORD = "share4v.record"  # the request's RequestRecord in its scope, see request_log.py
LINGER_S, PING_S = 1.0, 15.0
SMALL_BODY, PARSE_THREADS = 64 << 10, 2
SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class JsonResponse(Response):
    """Strict JSON on one line."""

    media_type = "application/json"

    def __init__(self, value: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(to_json(value).encode("utf-8", "replace"), status_code, headers)


class ErrorResponse(JsonResponse):
    """OpenAI's error object. Briefly drains a body that is still arriving, so that the client reads the response."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), error.status, error.headers)
        self._message = str(error)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI call."""
        if RECORD in scope:
            scope[RECORD].error = self._message
        unread = scope["method"] in ("POST", "PUT") and not scope.get(BODY_READ)
        if unread:
            self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if unread:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while (await receive()).get("more_body"):
                        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventStreamResponse(Response):
    """Server-sent events from an async iterator, with keep-alive comments; calls `close` at the end."""

    def __init__(self, events: AsyncGenerator[str, None], *, close: Callable[[], None]) -> None:
        super().__init__(
            status_code=200,
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI call."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await run_until_disconnect(receive, self._pump(send))
        finally:
            self._close()

    async def _pump(self, send: Any) -> None:
        following: asyncio.Task | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self._events, None))
                await asyncio.wait({following}, timeout=PING_S)
                text = ": ping\n\n"
                if following.done():
                    text, following = following.result(), None
                if text is None:
                    break
                await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})
        finally:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def run_until_disconnect(receive: Any, work: Coroutine[Any, Any, T]) -> T | None:
    """Result of `work`; None when the client disconnects first, which cancels it.

    The request body must have been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


class BodyReader:
    """Reads request bodies and limits the bytes buffered by requests in preparation."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(PARSE_THREADS, thread_name_prefix="parse")
        self.buffered = 0

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[JsonFields]:
        """Yield the body as a JSON object. Raises ApiError: 400, 408, 413, 415, 429."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also blocks other origins: a browser needs a CORS preflight for this type, which is not granted.
            raise ApiError(
                f"content-type must be application/json, got {kind[:60] or 'none'!r}; with curl: "
                "-H 'Content-Type: application/json'",
                status=415,
            )
        counted = 0
        try:
            body = bytearray()
            self._check_size(_declared_size(request))
            deadline = time.monotonic() + self._config.body_timeout_s
            while True:
                message = await self._next(request, deadline)
                chunk = message.get("body", b"")
                self._check_size(len(body) + len(chunk))
                body += chunk
                # Small bodies are not counted: those of text-only requests always find room beside images.
                if (added := len(body) - counted) and len(body) > SMALL_BODY:
                    self._check_buffered(added)
                    counted += added
                    self.buffered += added
                if not message.get("more_body"):
                    break
            request.scope[BODY_READ] = True
            if len(body) <= SMALL_BODY:
                fields = parse_object(bytes(body))
            else:  # off the event loop
                loop = asyncio.get_running_loop()
                fields = await loop.run_in_executor(self._threads, parse_object, bytes(body))
            del body
            yield fields
        finally:
            self.buffered -= counted

    async def _next(self, request: Request, deadline: float) -> MutableMapping[str, Any]:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await request.receive()
        except TimeoutError as error:
            raise ApiError(f"the body did not arrive within {self._config.body_timeout_s:g} s", status=408) from error
        if message["type"] == "http.disconnect":
            raise ApiError("the client disconnected", status=400)
        return message

    def _check_size(self, size: int) -> None:
        if size > self._config.max_body_bytes:
            raise ApiError(
                f"the body has more than {self._config.max_body_bytes} bytes, which is what this server accepts",
                status=413,
            )

    def _check_buffered(self, size: int) -> None:
        if self.buffered + size > self._config.max_buffered_bytes:
            raise ApiError("too many large requests at once; try again later", status=429, headers={"Retry-After": "2"})


def _declared_size(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


class AuthMiddleware:
    """ASGI middleware: checks the API key, adds security headers, counts errors, answers unexpected ones with 500."""

    def __init__(self, app: Any, *, config: ServeConfig, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if config.api_key is None else _digest(config.api_key.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def send_guarded(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *SAFE_HEADERS]
                if message["status"] >= 400:
                    self._metrics.count_error(message["status"])
            await send(message)

        if not self._allows(scope):
            error = ApiError(
                "a valid key is needed: send the header Authorization: Bearer KEY",
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
            await ErrorResponse(error)(scope, receive, send_guarded)
            return
        try:
            await self._app(scope, receive, send_guarded)
        except asyncio.CancelledError:
            # drain_s has passed during shutdown. Nothing follows in this task, so swallow it.
            get_logger().info("the server is stopping: an answer was cut off")
            if not started:
                await ErrorResponse(unavailable_error("the server is stopping"))(scope, receive, send_guarded)
        except Exception:
            # Here and not in Starlette's outermost handler, so that the response has the request's id.
            get_logger().exception("%s %s failed", scope["method"], scope["path"][:200])
            if started:
                raise
            error = ApiError("internal server error; see the server's log", status=500)
            await ErrorResponse(error)(scope, receive, send_guarded)

    def _allows(self, scope: Any) -> bool:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # Digests have a fixed length, so the comparison time does not depend on the key.
        return hmac.compare_digest(_digest(key.strip()), self._key) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def handle_exception(request: Request, error: Exception) -> Response:
    """Starlette exception handler: ApiError, and Starlette's own for an unknown path and a wrong method."""
    if isinstance(error, ApiError):
        return ErrorResponse(error)
    assert isinstance(error, HTTPException)
    what = {
        404: f"{request.url.path[:200]} does not exist",
        405: f"{request.method[:20]} is not a method of {request.url.path[:200]}",
    }
    return ErrorResponse(
        ApiError(what.get(error.status_code, error.detail), status=error.status_code, headers=error.headers)
    )

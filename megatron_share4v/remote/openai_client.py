"""Client of OpenAI's chat completions API with bounded retries, for captioning and evaluation.

Concurrency and the handling of errors are the caller's. The API key is never logged.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_share4v.errors import ConfigError, DataError

RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
FATAL_STATUSES = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
MAX_RETRY_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Endpoint settings.

    url: up to and including /v1. retries: further attempts per request. timeout_s: of one response. key: sent as bearer
    token.
    """

    url: str
    model: str
    key: str | None = None
    concurrency: int = 16
    retries: int = 5
    timeout_s: float = 300.0
    first_wait_s: float = 1.0


@dataclass(frozen=True)
class Reply:
    """One response. tokens: completion tokens, 0 when not reported. model: the name the server reports."""

    text: str
    tokens: int
    finish_reason: str | None
    model: str


class _TransientError(Exception):
    """A transient failure. wait_s: from Retry-After."""

    def __init__(self, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class RequestRefused(DataError):
    """The endpoint refused this request; others may succeed."""


class _RejectRedirects(urllib.request.HTTPRedirectHandler):
    """Rejects redirects, which would send the key elsewhere and turn the POST into a GET."""

    def redirect_request(self, *arguments: object) -> None:
        return None


class ChatClient:
    """Thread-safe chat client."""

    def __init__(self, endpoint: Endpoint, *, sleep: Callable[[float], object] | None = None) -> None:
        """Raise ConfigError for an invalid URL."""
        if urlsplit(endpoint.url).scheme not in ("http", "https") or not urlsplit(endpoint.url).netloc:
            raise ConfigError(
                f"endpoint {endpoint.url!r}: is not an http(s) URL; give the part up to and including /v1, as in "
                "http://127.0.0.1:8000/v1"
            )
        self.endpoint = endpoint
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._opener = urllib.request.build_opener(_RejectRedirects)

    def stop(self) -> None:
        """End retry pauses and stop retrying: the job is over."""
        self._stopped.set()

    def ask(self, body: Mapping[str, object]) -> Reply:
        """Send `body` and return the response; the endpoint's model is added where the body names none.

        Raises ConfigError when the endpoint rejects key, model or path, RequestRefused when it rejects this request,
        and another DataError when every attempt fails.
        """
        data = json.dumps({"model": self.endpoint.model, **body}).encode()
        for number in range(self.endpoint.retries + 1):
            try:
                return self._send(data)
            except _TransientError as error:
                reason = str(error)
                if self._stopped.is_set():
                    break
                if number < self.endpoint.retries:
                    pause = (
                        error.wait_s
                        if error.wait_s is not None
                        else self.endpoint.first_wait_s * 2**number * random.uniform(0.75, 1.25)
                    )
                    self._sleep(min(pause, MAX_RETRY_WAIT_S))
        raise DataError(f"{reason}, {self.endpoint.retries + 1} times")

    def _send(self, data: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        request = urllib.request.Request(
            f"{self.endpoint.url.rstrip('/')}/chat/completions", data=data, headers=headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout_s) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise self._error_of_status(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(f"no response ({getattr(error, 'reason', error) or type(error).__name__})") from error
        try:
            return parse_completion(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise _TransientError(
                f"the response is not a chat completion ({type(error).__name__}: {error}): {text[:80]!r}"
            ) from error

    def _error_of_status(self, error: urllib.error.HTTPError) -> Exception:
        try:
            body = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as cut:
            body = str(cut)
        what = f"HTTP {error.code}: {body[:300].strip() or error.reason}"
        if error.code in FATAL_STATUSES:
            return ConfigError(
                f"endpoint {self.endpoint.url}, model {self.endpoint.model}: {what}; check URL, the model's name and "
                "the key"
            )
        if error.code in RETRIED_STATUSES:
            retry_after = error.headers.get("Retry-After", "")
            return _TransientError(what, wait_s=float(retry_after) if retry_after.isdecimal() else None)
        return RequestRefused(f"the endpoint refused: {what}")


def parse_completion(content: object) -> Reply:
    """Parse a chat completion with one choice. Raises ValueError for anything else."""
    try:
        if not isinstance(content, dict):
            raise TypeError(f"expected an object, got {type(content).__name__}")
        [choice] = content["choices"]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        tokens = (content.get("usage") or {}).get("completion_tokens") or 0
        model = content.get("model") or ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(text, str) or not isinstance(tokens, int) or not isinstance(model, str):
        raise ValueError(f"its content is a {type(text).__name__}")
    return Reply(text=text, tokens=tokens, finish_reason=finish, model=model)

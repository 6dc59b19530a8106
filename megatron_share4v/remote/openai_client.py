"""A client of OpenAI's chat completions, the only one of the house: one request in, one reply out, tried again within a bound.

What is asked, of how many at a time, and what becomes of refusals is the caller's; so is the key, which is never logged.
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

TRIED_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
NOT_ABOUT_THE_REQUEST = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """url: up to and with /v1. retries: further tries of one request. timeout_s: of one reply. key: sent as a bearer token."""

    url: str
    model: str
    key: str | None = None
    concurrency: int = 16
    retries: int = 5
    timeout_s: float = 300.0
    first_wait_s: float = 1.0


@dataclass(frozen=True)
class Reply:
    """text: as it came. tokens: of the reply, 0 where the server does not say. model: as the server calls itself."""

    text: str
    tokens: int
    finish_reason: str | None
    model: str


class _TryAgain(Exception):
    """This time it failed; `wait_s` as the server asks."""

    def __init__(self, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key elsewhere, and make a GET of the request."""

    def redirect_request(self, *arguments: object) -> None:
        return None


class ChatClient:
    """May be used by many threads at once."""

    def __init__(self, endpoint: Endpoint, *, sleep: Callable[[float], object] | None = None) -> None:
        """Raises ConfigError for what is no URL."""
        if urlsplit(endpoint.url).scheme not in ("http", "https") or not urlsplit(endpoint.url).netloc:
            raise ConfigError(
                f"endpoint {endpoint.url!r}: is no http(s) URL; give the part up to and with /v1, as in http://127.0.0.1:8000/v1"
            )
        self.endpoint = endpoint
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._opener = urllib.request.build_opener(_Stay)

    def stop(self) -> None:
        """End pauses, and try nothing again: the job is over."""
        self._stopped.set()

    def ask(self, body: Mapping[str, object]) -> Reply:
        """The reply to `body`, to which the endpoint's model is added where it names none.

        Raises ConfigError when the endpoint refuses key, model or path, and DataError when it refuses this request or never answers it.
        """
        data = json.dumps({"model": self.endpoint.model, **body}).encode()
        for number in range(self.endpoint.retries + 1):
            try:
                return self._once(data)
            except _TryAgain as error:
                reason = str(error)
                if self._stopped.is_set():
                    break
                if number < self.endpoint.retries:
                    pause = (
                        error.wait_s
                        if error.wait_s is not None
                        else self.endpoint.first_wait_s * 2**number * random.uniform(0.75, 1.25)
                    )
                    self._sleep(min(pause, LONGEST_WAIT_S))
        raise DataError(f"{reason}, {self.endpoint.retries + 1} times")

    def _once(self, data: bytes) -> Reply:
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
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(f"no answer ({getattr(error, 'reason', error) or type(error).__name__})") from error
        try:
            return parse_completion(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise _TryAgain(
                f"the answer is no chat completion ({type(error).__name__}: {error}): {text[:80]!r}"
            ) from error

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as cut:
            said = str(cut)
        what = f"HTTP {error.code}: {said[:300].strip() or error.reason}"
        if error.code in NOT_ABOUT_THE_REQUEST:
            return ConfigError(
                f"endpoint {self.endpoint.url}, model {self.endpoint.model}: {what}; check URL, the model's name and the key"
            )
        if error.code in TRIED_AGAIN:
            asked = error.headers.get("Retry-After", "")
            return _TryAgain(what, wait_s=float(asked) if asked.isdecimal() else None)
        return DataError(f"the endpoint refused: {what}")


def parse_completion(content: object) -> Reply:
    """The one choice of a chat completion. Raises ValueError for anything else."""
    try:
        [choice] = content["choices"]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        tokens = (content.get("usage") or {}).get("completion_tokens") or 0
        model = content.get("model") or ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(text, str) or not isinstance(tokens, int) or not isinstance(model, str):
        raise ValueError(f"its content is a {type(text).__name__}")
    return Reply(text=text, tokens=tokens, finish_reason=finish, model=model)

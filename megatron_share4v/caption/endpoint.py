"""Captions from a server that speaks OpenAI's chat completions: several requests at a time, tried again within a bound.

A refusal of one image becomes that image's error; an endpoint that answers nothing ends the job, with nothing written about the images in question.
"""

from __future__ import annotations

import base64
import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from urllib.parse import urlsplit

from megatron_share4v.caption.job import JobOptions, Summary, run_job
from megatron_share4v.caption.records import Picture, Row, Settings
from megatron_share4v.data.decode_pil import inspect
from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.infer.journal import Share
from megatron_share4v.parallel.launch import World

TRIED_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
NOT_ABOUT_THE_IMAGE = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
LONGEST_WAIT_S = 60.0
LEAST_FAILURES = 8
_MIME = {"jpg": "jpeg", "tif": "tiff", "jp2": "jp2"}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """url: up to and with /v1. retries: further tries of one image. timeout_s: of one answer. key: sent as a bearer token."""

    url: str
    model: str
    key: str | None = None
    concurrency: int = 16
    retries: int = 5
    timeout_s: float = 300.0
    first_wait_s: float = 1.0


class _TryAgain(Exception):
    """This time it failed; `wait_s` as the server asks."""

    def __init__(self, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key elsewhere, and make a GET of the request."""

    def redirect_request(self, *arguments: object) -> None:
        return None


def caption_with_endpoint(endpoint: Endpoint, job: JobOptions, *, settings: Settings, world: World) -> Summary | None:
    """The captions of `job` from a server: see run_job. Raises ConfigError, DataError."""
    if world.size > 1:
        raise ConfigError(f"--endpoint is asked by one process, and torchrun started {world.size}; start without it, and raise --concurrency")
    return run_job(EndpointCaptioner(endpoint, settings=settings), job, settings=settings, model=endpoint.model, share=Share())


class EndpointCaptioner:
    """Calls yield rows as they are finished; pictures are taken from the iterator only as they are needed."""

    def __init__(self, endpoint: Endpoint, *, settings: Settings, sleep: Callable[[float], object] | None = None) -> None:
        """Raises ConfigError for what is no URL."""
        if urlsplit(endpoint.url).scheme not in ("http", "https") or not urlsplit(endpoint.url).netloc:
            raise ConfigError(f"--endpoint {endpoint.url!r}: is no http(s) URL; give the part up to and with /v1, as in http://127.0.0.1:8000/v1")
        if settings.num_beams > 1:
            raise ConfigError(f"--num-beams {settings.num_beams}: OpenAI's interface has no beams; leave it out, or caption with --model-name")
        self._stopped = threading.Event()
        self._endpoint, self._settings, self._sleep = endpoint, settings, sleep or self._stopped.wait
        self._opener = urllib.request.build_opener(_Stay)

    def __call__(self, pictures: Iterator[Picture]) -> Iterator[list[Row]]:
        """Raises ConfigError when the endpoint refuses key, model or path, or fails for many images with no answer in between."""
        most = max(LEAST_FAILURES, 2 * self._endpoint.concurrency)
        held: list[Row] = []  # failures that may be the endpoint's: an answer proves that it lives
        lives = False
        pool = ThreadPoolExecutor(self._endpoint.concurrency)
        going = {pool.submit(self._row, picture) for picture in islice(pictures, self._endpoint.concurrency)}
        try:
            while going:
                finished, going = wait(going, return_when=FIRST_COMPLETED)
                going |= {pool.submit(self._row, picture) for picture in islice(pictures, len(finished))}
                rows, failures = self._sorted(finished)
                held += failures
                if any(row.error is None for row in rows):
                    rows, held, lives = rows + held, [], True
                if len(held) >= most or held and not going and not lives:
                    raise ConfigError(
                        f"endpoint {self._endpoint.url}: the last {len(held)} images got no caption ({held[-1].error}); see to it, and start "
                        "the same command again: what was captioned is kept"
                    )
                if rows:
                    yield rows
        finally:
            self._stopped.set()  # whoever ends the job early does not wait for pauses and answers that are still to come
            pool.shutdown(wait=False, cancel_futures=True)
        if held:
            yield held

    @staticmethod
    def _sorted(finished: set[Future]) -> tuple[list[Row], list[Row]]:
        """Rows that are certain, and failures."""
        results = [future.result() for future in finished]
        return [row for row, is_certain in results if is_certain], [row for row, is_certain in results if not is_certain]

    def _row(self, picture: Picture) -> tuple[Row, bool]:
        try:
            data = picture.read()
            extension = inspect(data).extension
        except DataError as error:
            return Row(picture.id, picture.path, error=str(error)), True
        body = json.dumps(self._question(picture, data, extension)).encode()
        for number in range(self._endpoint.retries + 1):
            try:
                return self._ask(picture, body), True
            except _TryAgain as error:
                reason = str(error)
                if self._stopped.is_set():
                    break
                if number < self._endpoint.retries:
                    pause = error.wait_s if error.wait_s is not None else self._endpoint.first_wait_s * 2**number * random.uniform(0.75, 1.25)
                    self._sleep(min(pause, LONGEST_WAIT_S))
            except DataError as error:
                return Row(picture.id, picture.path, error=str(error)), False
        return Row(picture.id, picture.path, error=f"{reason}, {self._endpoint.retries + 1} times"), False

    def _question(self, picture: Picture, data: bytes, extension: str) -> dict[str, object]:
        url = f"data:image/{_MIME.get(extension, extension)};base64,{base64.b64encode(data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self._settings.prompt}]
        given = self._settings
        body = {"model": self._endpoint.model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": given.max_new_tokens, "temperature": given.temperature}
        if given.temperature:
            body |= {"top_p": given.top_p, "seed": given.seed_of(picture)}
        if given.repetition_penalty != 1.0:
            body["repetition_penalty"] = given.repetition_penalty  # not OpenAI's; ours and vLLM know it
        return body

    def _ask(self, picture: Picture, body: bytes) -> Row:
        headers = {"Content-Type": "application/json"}
        if self._endpoint.key:
            headers["Authorization"] = f"Bearer {self._endpoint.key}"
        request = urllib.request.Request(f"{self._endpoint.url.rstrip('/')}/chat/completions", data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._endpoint.timeout_s) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(f"no answer ({getattr(error, 'reason', error) or type(error).__name__})") from error
        try:
            content = json.loads(text)
            [choice] = content["choices"]
            caption, finish = choice["message"]["content"], choice.get("finish_reason")
            tokens = (content.get("usage") or {}).get("completion_tokens") or 0
            if not isinstance(caption, str) or not isinstance(tokens, int):
                raise ValueError(f"its content is a {type(caption).__name__}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _TryAgain(f"the answer is no chat completion ({type(error).__name__}: {error}): {text[:80]!r}") from error
        return Row(picture.id, picture.path, caption=caption.strip(), tokens=tokens, finish_reason=finish)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as cut:
            said = str(cut)
        what = f"HTTP {error.code}: {said[:300].strip() or error.reason}"
        if error.code in NOT_ABOUT_THE_IMAGE:
            return ConfigError(f"endpoint {self._endpoint.url}, model {self._endpoint.model}: {what}; check URL, --endpoint-model and the key")
        if error.code in TRIED_AGAIN:
            asked = error.headers.get("Retry-After", "")
            return _TryAgain(what, wait_s=float(asked) if asked.isdecimal() else None)
        return DataError(f"the endpoint refused: {what}")

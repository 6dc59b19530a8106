"""Captions from an OpenAI-compatible server: concurrent requests with bounded retries.

A rejected image becomes that image's error; an endpoint that answers nothing ends the job without recording errors for
the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from megatron_share4v.caption.job import JobOptions, JobSummary, run_job
from megatron_share4v.caption.records import CaptionRow, CaptionSettings, ImageEntry
from megatron_share4v.data.images.pil_decoder import image_to_data_url
from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.infer.answer_log import DPGroup
from megatron_share4v.parallel.launch import World
from megatron_share4v.remote.openai_client import ChatClient, Endpoint

MIN_FAILURES = 8


def caption_with_endpoint(
    endpoint: Endpoint, job: JobOptions, *, settings: CaptionSettings, world: World
) -> JobSummary | None:
    """Caption `job` with a server: see run_job. Raises ConfigError, DataError."""
    if world.size > 1:
        raise ConfigError(
            f"--endpoint runs in one process, and torchrun started {world.size}; start without it, and raise "
            "--concurrency"
        )
    return run_job(
        EndpointCaptioner(endpoint, settings=settings), job, settings=settings, model=endpoint.model, share=DPGroup()
    )


class EndpointCaptioner:
    """Yields rows as they finish, in any order; images are consumed only as needed."""

    def __init__(
        self, endpoint: Endpoint, *, settings: CaptionSettings, sleep: Callable[[float], object] | None = None
    ) -> None:
        """Raise ConfigError for an invalid URL or for beams."""
        if settings.num_beams > 1:
            raise ConfigError(
                f"--num-beams {settings.num_beams}: OpenAI's API has no beam search; leave it out, or caption with "
                "--model-name"
            )
        self._endpoint, self._settings, self._client = endpoint, settings, ChatClient(endpoint, sleep=sleep)

    def __call__(self, pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        """Caption images.

        Raises ConfigError when the endpoint rejects key, model or path, or fails for many images with no success in
        between.
        """
        max_failures = max(MIN_FAILURES, 2 * self._endpoint.concurrency)
        held: list[CaptionRow] = []  # failures that may be the endpoint's fault; a success shows that it works
        works = False
        pool = ThreadPoolExecutor(self._endpoint.concurrency)
        running = {pool.submit(self._caption, picture) for picture in islice(pictures, self._endpoint.concurrency)}
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(self._caption, picture) for picture in islice(pictures, len(finished))}
                rows, failures = self._split_finished(finished)
                held += failures
                if any(row.error is None for row in rows):
                    rows, held, works = rows + held, [], True
                if len(held) >= max_failures or (held and not running and not works):
                    raise ConfigError(
                        f"endpoint {self._endpoint.url}: the last {len(held)} images got no caption "
                        f"({held[-1].error}); fix it and run the same command again: finished captions are kept"
                    )
                if rows:
                    yield rows
        finally:
            self._client.stop()  # do not wait for retry pauses and pending answers when the job ends early
            pool.shutdown(wait=False, cancel_futures=True)
        if held:
            yield held

    @staticmethod
    def _split_finished(finished: set[Future]) -> tuple[list[CaptionRow], list[CaptionRow]]:
        """Split finished rows into definitive ones and failures that the endpoint may have caused."""
        results = [future.result() for future in finished]
        return [row for row, is_certain in results if is_certain], [
            row for row, is_certain in results if not is_certain
        ]

    def _caption(self, picture: ImageEntry) -> tuple[CaptionRow, bool]:
        try:
            url = image_to_data_url(picture.read())
        except DataError as error:
            return CaptionRow(picture.id, picture.path, error=str(error)), True
        try:
            reply = self._client.ask(self._request_body(picture, url))
        except DataError as error:
            return CaptionRow(picture.id, picture.path, error=str(error)), False
        return CaptionRow(
            picture.id, picture.path, caption=reply.text.strip(), tokens=reply.tokens, finish_reason=reply.finish_reason
        ), True

    def _request_body(self, picture: ImageEntry, url: str) -> dict[str, object]:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self._settings.prompt}]
        given = self._settings
        body: dict[str, object] = {"messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": given.max_new_tokens, "temperature": given.temperature}
        if given.temperature:
            body |= {"top_p": given.top_p, "seed": given.seed_of(picture)}
        if given.repetition_penalty != 1.0:
            body["repetition_penalty"] = given.repetition_penalty  # an extension of this project's server and vLLM
        return body

"""Images of requests: fetched where allowed, then decoded in processes, with a bounded queue and a deadline.

Only requests with images wait here; text is tokenized elsewhere.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.data.images.decode_pool import DecodePool, DecodeRequest
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.errors import DataError
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.images.fetch import ImageFetcher
from megatron_share4v.serve.images.input import check_image, decode_data_uri, is_inline


class ImageLoader:
    """Loader of images from data URLs and, where allowed, from http(s) URLs.

    pool: replaceable for tests. waiting: images that wait for a process or are being decoded.
    """

    def __init__(self, config: ServeConfig, *, fetcher: ImageFetcher | None = None) -> None:
        self._config, workers = config, config.image_workers
        self.pool = DecodePool(processes=workers, timeout_s=config.image_decode_timeout_s)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="image")  # each waits for a process
        self._starts: list[Future[None]] = []
        self._closed = False
        self._fetching = asyncio.Semaphore(4 * workers)
        self.waiting = 0
        self._fetcher = fetcher
        if fetcher is None and config.allow_image_urls is not None:
            domains = tuple(domain.lower().strip(".") for domain in config.allow_image_urls)
            self._fetcher = ImageFetcher(
                domains=domains, max_bytes=config.max_image_bytes, timeout_s=config.image_timeout_s
            )

    def start(self) -> None:
        """Start the processes in the background."""
        self._starts = [self._threads.submit(self.pool.start) for _ in range(self._config.image_workers)]

    def wait_started(self) -> None:
        """Block until all processes decode, or `close`. Raises DataError when one cannot start."""
        try:
            for start in self._starts:
                start.result()
        except (DataError, CancelledError):
            if not self._closed:
                raise

    def close(self) -> None:
        """End the threads and the processes."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.pool.close()

    async def load(self, url: str, *, policy: ImagePolicy, place: str) -> np.ndarray:
        """Pixels [S, S, 3] uint8 of the image at `url`. place: its name in messages. Raises ApiError: 400, 429."""
        if self.waiting >= self._config.max_waiting_images + self._config.image_workers:
            raise ApiError(
                f"{self._config.max_waiting_images} images are waiting to be decoded; try again later",
                status=429,
                headers={"Retry-After": "2"},
            )
        self.waiting += 1
        try:
            source = url if is_inline(url) else await self._fetch(url, place)
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, source, policy, place)
        finally:
            self.waiting -= 1

    async def _fetch(self, url: str, place: str) -> bytes:
        if self._fetcher is None:
            raise ApiError(
                f"{place}: this server does not fetch images; send them as data:image/...;base64,... URLs", param=place
            )
        async with self._fetching:
            return await self._fetcher.fetch(url, place=place)

    def _decode(self, source: str | bytes, policy: ImagePolicy, place: str) -> np.ndarray:
        limit = self._config.max_image_bytes
        data = decode_data_uri(source, place=place, max_bytes=limit) if isinstance(source, str) else source
        check_image(data, self._config, place=place)
        try:
            return self.pool.decode(DecodeRequest(data, policy, self._config.max_image_pixels))
        except DataError as error:
            raise ApiError(f"{place}: {error}", param=place) from error

"""Configuration of the server: address, authentication, and limits of requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, Strict

from megatron_share4v.config.base import Conflict, NonNegativeInt, PositiveFloat, PositiveInt, config

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@config
class ServeConfig:
    """Address, API key and limits of the server; the limits protect the machine from its clients."""

    host: str = "127.0.0.1"
    port: Annotated[int, Strict(), Field(ge=0, le=65535)] = 8000
    """0: any free port."""
    api_key: str | None = None
    """Required of every request except for the page and /health; null: none required."""
    model_name: str = "share4v"
    """Name in /v1/models, which `model` in a request must equal."""
    max_waiting: NonNegativeInt = 64
    """Sequences that may wait for the engine; more are refused with 429."""
    max_choices: PositiveInt = 128
    """Largest number of choices of one request (n x prompts)."""
    max_body_bytes: PositiveInt = 32 << 20
    """Largest request body; more is refused with 413."""
    max_buffered_bytes: PositiveInt = 256 << 20
    """Total size of requests that are being read or prepared; more are refused with 429."""
    body_timeout_s: PositiveFloat = 60.0
    """Time to receive a body; a slower one is refused with 408."""
    max_images: PositiveInt = 1
    """Images per conversation; the models are trained with one."""
    max_image_bytes: PositiveInt = 20_000_000
    max_image_pixels: PositiveInt = 50_000_000
    image_workers: PositiveInt = 2
    """Threads that decode images and tokenize."""
    allow_image_urls: tuple[str, ...] | None = None
    """Domains whose http(s) image URLs are fetched, subdomains included; an empty list: any domain; null: images come
    inside the request only."""
    image_timeout_s: PositiveFloat = 5.0
    """Time to fetch one image, name look-up included."""
    drain_s: PositiveFloat = 20.0
    """Time for running requests after SIGTERM; torchrun kills its ranks after 30 s."""

    @property
    def is_open(self) -> bool:
        """Whether other machines can send requests without a key."""
        return self.host not in LOOPBACK and self.api_key is None

    def conflicts(self) -> Iterator[Conflict]:
        """Find a key that no client can send, and a buffer too small for one body."""
        if self.api_key is not None and (
            not self.api_key.isascii() or not self.api_key.isprintable() or not self.api_key.strip()
        ):
            yield Conflict("api_key must be printable ASCII and not blank: it travels in a header", ("api_key",))
        if self.max_buffered_bytes < self.max_body_bytes:
            message = f"max_buffered_bytes {self.max_buffered_bytes} is less than max_body_bytes {self.max_body_bytes}"
            yield Conflict(message, ("max_buffered_bytes", "max_body_bytes"))

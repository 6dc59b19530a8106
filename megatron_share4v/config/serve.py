"""What a server is told: where it listens, whom it lets in, and how much it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, Strict

from megatron_share4v.config.base import Conflict, NonNegativeInt, PositiveFloat, PositiveInt, config

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@config
class ServeConfig:
    """Limits protect the machine: whoever can reach the port can ask."""

    host: str = "127.0.0.1"
    port: Annotated[int, Strict(), Field(ge=0, le=65535)] = 8000
    """0: any free one."""
    api_key: str | None = None
    """Asked of every request but those for the page and /health; None: nobody is asked."""
    model_name: str = "share4v"
    """What /v1/models lists and `model` in a request must be."""
    max_waiting: NonNegativeInt = 64
    """Answers that may wait for a place in the engine; more are refused with 429."""
    max_choices: PositiveInt = 128
    """Answers that one request may ask for (n x prompts)."""
    max_body_bytes: PositiveInt = 32 << 20
    """Of one request; more is refused with 413."""
    max_buffered_bytes: PositiveInt = 256 << 20
    """Of all requests that are being read or prepared; more are refused with 429."""
    body_timeout_s: PositiveFloat = 60.0
    """A body that is not there by then is refused with 408."""
    max_images: PositiveInt = 1
    """Per conversation. The models are trained with one."""
    max_image_bytes: PositiveInt = 20_000_000
    max_image_pixels: PositiveInt = 50_000_000
    image_workers: PositiveInt = 2
    """Threads that decode images and tokenise."""
    allow_image_urls: tuple[str, ...] | None = None
    """None: images come inside the request only. A list: http(s) URLs of these domains and their subdomains are fetched; an empty one: of any."""
    image_timeout_s: PositiveFloat = 5.0
    """For one image from elsewhere, name look-up included."""
    drain_s: PositiveFloat = 20.0
    """How long running answers may go on after the server was told to stop; torchrun kills its ranks after 30."""

    @property
    def is_open(self) -> bool:
        """Whether other machines can ask without a key."""
        return self.host not in LOOPBACK and self.api_key is None

    def conflicts(self) -> Iterator[Conflict]:
        """A key that no client can send, and bodies that can never be read."""
        if self.api_key is not None and (
            not self.api_key.isascii() or not self.api_key.isprintable() or not self.api_key.strip()
        ):
            yield Conflict("api_key must be printable ASCII and not blank: it travels in a header", ("api_key",))
        if self.max_buffered_bytes < self.max_body_bytes:
            message = f"max_buffered_bytes {self.max_buffered_bytes} is less than max_body_bytes {self.max_body_bytes}"
            yield Conflict(message, ("max_buffered_bytes", "max_body_bytes"))

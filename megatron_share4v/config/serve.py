"""Configuration of the server: address, authentication, and limits of requests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, Strict

from megatron_share4v.config.base import Conflict, NonNegativeInt, PositiveFloat, PositiveInt, config
from megatron_share4v.errors import ConfigError
from megatron_share4v.files import read_text

_ORIGIN = re.compile(r"https?://[^/\s?#@]+")
HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
API_KEY_VARIABLE = "SHARE4V_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@config
class ServeConfig:
    """Address, API key and limits of the server; the limits protect the machine from its clients."""

    host: str = "127.0.0.1"
    port: Annotated[int, Strict(), Field(ge=0, le=65535)] = 8000
    """0: any free port."""
    api_key: str | None = None
    """Required of every request except for the page and /health; null: none required. Better given by --api-key-file or
    in the environment variable SHARE4V_API_KEY: other users of the machine see command lines."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which clients reach the server (*.example.com: with subdomains, *: any), beside addresses, localhost,
    --host and the machine's name; others are refused with 403, against DNS rebinding. With a key and without this list,
    names are not checked."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (https://chat.example.com; *: any) whose web pages may use the API; none by default."""
    model_name: str = "share4v"
    """Name in /v1/models, which `model` in a request must equal."""
    max_connections: PositiveInt = 1000
    """Open connections, fewer where ulimit -n is lower; a further one replaces the longest idle one, or gets 503."""
    header_timeout_s: PositiveFloat = 10.0
    """Time to receive the header of a request; the connection of a slower one is closed."""
    idle_timeout_s: PositiveInt = 15
    """Time after a response in which the next request on its connection must begin."""
    write_timeout_s: PositiveFloat = 60.0
    """Time in which a client reads nothing of its response; its connection is then closed."""
    max_waiting: NonNegativeInt = 64
    """Sequences that may wait for the engine; more are refused with 429."""
    max_choices: PositiveInt = 128
    """Largest number of choices of one request (n x prompts)."""
    max_body_bytes: PositiveInt = 32 << 20
    """Largest request body; more is refused with 413."""
    max_buffered_bytes: PositiveInt = 256 << 20
    """Total size of requests above 64 KiB that are being read or prepared; more are refused with 429."""
    body_timeout_s: PositiveFloat = 60.0
    """Time to receive a body; a slower one is refused with 408."""
    max_images: PositiveInt = 1
    """Images per conversation; the models are trained with one."""
    max_image_bytes: PositiveInt = 20_000_000
    max_image_pixels: PositiveInt = 50_000_000
    """Largest image in pixels; at most 64 million, the limit of training."""
    image_workers: PositiveInt = 2
    """Processes that decode images."""
    image_decode_timeout_s: PositiveFloat = 10.0
    """Time to decode one image; a slower one is refused with 400 and its process is replaced."""
    max_waiting_images: NonNegativeInt = 128
    """Images that may wait to be decoded; more are refused with 429."""
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
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                message = f"allowed_origins {origin!r} must be http://NAME, https://NAME, either with :PORT, or *"
                yield Conflict(message, ("allowed_origins",))
        for host in self.allowed_hosts:
            if host != "*" and not HOST_NAME.fullmatch(host):
                message = f"allowed_hosts {host!r} must be a name without scheme, port and path, *.NAME or *"
                yield Conflict(message, ("allowed_hosts",))
        if self.max_buffered_bytes < self.max_body_bytes:
            message = f"max_buffered_bytes {self.max_buffered_bytes} is less than max_body_bytes {self.max_body_bytes}"
            yield Conflict(message, ("max_buffered_bytes", "max_body_bytes"))


def find_api_key(*, option: str | None, file: Path | None) -> str | None:
    """The key of --api-key, --api-key-file or the environment variable SHARE4V_API_KEY, which an option overrides.

    Raises ConfigError when both options are given, or the file holds no key.
    """
    if option is not None and file is not None:
        raise ConfigError("--api-key and --api-key-file are both given; use one of them")
    if file is None:
        return option if option is not None else os.environ.get(API_KEY_VARIABLE)
    try:
        lines = read_text(file).split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"--api-key-file {file}: cannot be read ({reason})") from error
    if len(lines) != 1:
        raise ConfigError(f"--api-key-file {file}: holds {len(lines)} words; it must hold the key and nothing else")
    return lines[0]

"""Fetch images from http(s) URLs without server-side request forgery.

A name is resolved once, every resolved address must be public, and the connection goes to a vetted address. No
redirects, no credentials, one deadline for everything.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import h11

from megatron_share4v.serve.api_error import ApiError

CHUNK = 64 << 10
MAX_URL = 4096
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Prefixes that embed an IPv4 address reachable through a gateway: NAT64, 6to4, Teredo, IPv4-compatible.
_CARRIERS = tuple(
    ipaddress.ip_network(prefix) for prefix in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
)


def is_public(address: Address) -> bool:
    """Whether an address is globally routable and does not embed another address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in prefix for prefix in _CARRIERS):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, from the system resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class ImageFetcher:
    """Fetcher of images.

    domains: allowed domains with their subdomains; empty allows all. accepts and resolve: replaceable for tests.
    """

    domains: tuple[str, ...]
    max_bytes: int
    timeout_s: float
    accepts: Callable[[Address], bool] = is_public
    resolve: Callable = resolve

    async def fetch(self, url: str, *, place: str) -> bytes:
        """The file at `url`. Raises ApiError, whose text reveals nothing about non-public addresses."""
        try:
            parts, port = self._parse(url)
            async with asyncio.timeout(self.timeout_s):
                address = await self._vetted(parts.hostname or "", port)
                context = ssl.create_default_context() if parts.scheme == "https" else None
                name = parts.hostname if context else None
                reader, writer = await asyncio.open_connection(address, port, ssl=context, server_hostname=name)
                try:
                    return await self._exchange(reader, writer, parts)
                finally:
                    writer.transport.abort()
        except _FetchError as error:
            raise ApiError(f"{place}: {error}", param=place) from error
        except TimeoutError as error:
            raise ApiError(f"{place}: the image did not arrive within {self.timeout_s:g} s", param=place) from error
        except (OSError, UnicodeError, h11.RemoteProtocolError) as error:
            raise ApiError(f"{place}: the image cannot be fetched ({type(error).__name__})", param=place) from error

    def _parse(self, url: str) -> tuple[SplitResult, int]:
        if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise _FetchError(f"the URL must be ASCII without spaces and backslashes, of at most {MAX_URL} characters")
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError as error:
            raise _FetchError("the URL cannot be read") from error
        if port is None or not parts.hostname:
            raise _FetchError("the URL must be http://..., https://... or data:image/...")
        if parts.username is not None or parts.password is not None:
            raise _FetchError("the URL has credentials in it; fetch the image yourself and send it as a data URL")
        host = parts.hostname.rstrip(".")
        if self.domains and not any(host == domain or host.endswith(f".{domain}") for domain in self.domains):
            raise _FetchError(f"this server fetches images from {', '.join(self.domains)} only; send it as a data URL")
        return parts, port

    async def _vetted(self, host: str, port: int) -> str:
        found = [ipaddress.ip_address(address.partition("%")[0]) for address in await self.resolve(host, port)]
        if not found or not all(self.accepts(address) for address in found):
            raise _FetchError("the URL's host is not on the public internet")
        return str(found[0])

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: SplitResult) -> bytes:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=16 << 10)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.netloc.rpartition("@")[2]
        headers = [
            ("Host", host),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "megatron_share4v"),
            ("Connection", "close"),
        ]
        writer.write(
            connection.send(h11.Request(method="GET", target=target, headers=headers))
            + connection.send(h11.EndOfMessage())
        )
        data = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                if event.status_code != 200:
                    more = "; redirects are not followed" if 300 <= event.status_code < 400 else ""
                    raise _FetchError(f"the image's server answers {event.status_code}{more}")
            elif isinstance(event, h11.Data):
                data += event.data
                if len(data) > self.max_bytes:
                    raise _FetchError(f"the image has more than {self.max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(data)


class _FetchError(Exception):
    """Reason why a URL is not fetched."""

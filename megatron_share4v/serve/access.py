"""Who may reach the server: the Host header against DNS rebinding, and origins of other web pages (CORS)."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from megatron_share4v.config.serve import HOST_NAME, ServeConfig
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.http import ErrorResponse

ANY = "*"
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::[0-9]*)?")
_EXPOSED = ("X-Request-Id", "Retry-After")


class HostMiddleware:
    """ASGI middleware: refuses requests under a foreign host name with 403.

    A web page whose name its owner lets point to this machine (DNS rebinding) could otherwise use the server through a
    visitor's browser. Addresses are safe: a page cannot have one of this machine's as its name.
    """

    def __init__(self, app: Any, *, config: ServeConfig) -> None:
        self._app = app
        # With a key, such a page learns nothing; names are then checked only if some are given.
        self._checks = ANY not in config.allowed_hosts and bool(config.allowed_hosts or config.api_key is None)
        own = ("localhost", "*.localhost", config.host, socket.gethostname())
        self._allowed = tuple(name.lower().rstrip(".") for name in (*own, *config.allowed_hosts))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI call."""
        if scope["type"] == "http" and self._checks:
            host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            if not self._allows(host):
                error = ApiError(
                    f"this server does not answer under the host name {host[:100]!r}, so that no web page can reach it "
                    "by DNS rebinding; use the server's address, or list the name when it starts: --allowed-hosts "
                    f"{_name_of(host)}",
                    status=403,
                )
                await ErrorResponse(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].lower().rstrip(".")
        if not name:  # HTTP/1.0 without the header: no browser
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return any(
                name.endswith(allowed[1:]) if allowed.startswith("*.") else name == allowed for allowed in self._allowed
            )
        return True


def _name_of(host: str) -> str:
    """The name in a Host header, for the option that allows it; NAME for anything else."""
    name = host.partition(":")[0]
    return name if len(name) <= 100 and HOST_NAME.fullmatch(name) else "NAME"


def access_middleware(config: ServeConfig) -> list[Middleware]:
    """The middleware of this file, outermost first; without `allowed_origins` no page of another origin is let in."""
    origins = config.allowed_origins
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST", "PUT"),
        allow_headers=(ANY,),
        expose_headers=_EXPOSED,
    )
    return [Middleware(HostMiddleware, config=config), *([cors] if origins else [])]

"""HTTP connections: no delay of small packets, and limits on their number and on the time in which they do nothing.

When all connections are taken, the one that has been idle longest is closed for a new one, so that idle clients cannot
make the server deaf.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.logging import get_logger
from megatron_share4v.serve.api_error import unavailable_error

BACKLOG = 128
"""Connections accepted in one step of the event loop, which may exceed the limit by that many for a moment."""
RESERVED_FILES = BACKLOG + 256
"""Open files beside the connections: model files, pipes, image fetches."""
MIN_CONNECTIONS = 16
IDLE, RECEIVING, STALLED = range(3)
"""What a connection that may be closed for a new one does; the first is closed first."""


class LimitedConnection(H11Protocol):
    """A connection with the limits of `config`, which a subclass sets: see `connection_class`."""

    limits: ClassVar[ServeConfig]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Set the socket's options and the time limit of the first header; close another connection if need be."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._since = time.monotonic()
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio does this only when the listening socket names its protocol. Without it, the second packet of
            # each response on a kept connection waits for the client's delayed acknowledgement, 40 ms.
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._restart_timer(self.limits.header_timeout_s)
        if len(self.connections) > self.limits.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Handle data; the time limit of a header runs until it is complete."""
        super().data_received(data)
        if self.activity != IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._restart_timer(self.limits.header_timeout_s)

    def on_response_complete(self) -> None:
        """Note when the connection has become idle."""
        self._since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Stop writing to a client that does not read, for a limited time."""
        super().pause_writing()
        self._restart_timer(self.limits.write_timeout_s)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer with the connection."""
        super().connection_lost(exc)
        self._stop_timer()

    @property
    def activity(self) -> int | None:
        """What the connection does while it may be closed for a new one; None while it is answered."""
        if self.cycle is None or self.cycle.response_complete:
            return IDLE
        if self.cycle.more_body and not self.cycle.response_started:
            return RECEIVING
        return STALLED if self.flow.write_paused else None

    def _make_room(self) -> None:
        """Close the longest idle connection, or refuse this one where all others are being answered."""
        others = [cast(LimitedConnection, other) for other in self.connections if other is not self]
        candidates = [other for other in others if other.activity is not None]
        if candidates:
            oldest = min(candidates, key=lambda other: (other.activity, other._since))
            self.connections.discard(oldest)  # its file is closed in the next step of the event loop
            oldest.transport.abort()
            return
        error = unavailable_error(f"{self.limits.max_connections} connections are being answered; try again later")
        body = json.dumps(error.body()).encode()
        head = (
            f"HTTP/1.1 {error.status} Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"retry-after: {error.headers['Retry-After']}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _restart_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection_class(config: ServeConfig) -> type[LimitedConnection]:
    """Connections with the limits of a configuration."""
    return type("Connection", (LimitedConnection,), {"limits": config})


def fit_connections(wanted: int) -> int:
    """Number of connections that the limit of open files allows, at most `wanted`; raises the soft limit if it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    allowed = wanted if soft == resource.RLIM_INFINITY else max(MIN_CONNECTIONS, min(wanted, soft - RESERVED_FILES))
    if allowed < wanted:
        get_logger().info("ulimit -n %d leaves room for %d connections of %d", soft, allowed, wanted)
    return allowed


def report_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Event loop exception handler: one line for what asyncio would log with a traceback at each failed accept."""
    if str(context.get("message", "")).startswith("socket.accept()"):
        get_logger().getChild("accept").warning("cannot accept connections: %s", context.get("exception"))
    else:
        loop.default_exception_handler(context)

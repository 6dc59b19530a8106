"""Errors of the HTTP API: a status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """Becomes a response with `status`.

    param: dotted name of the invalid field. kind: the error type where the status does not imply it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})
        self.kind = kind or TYPES.get(status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The error object that the openai SDK maps to its exception classes."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}


def unavailable_error(message: str) -> ApiError:
    """A 503 with Retry-After."""
    return ApiError(message, status=503, headers={"Retry-After": "2"})

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

    param: dotted name of the invalid field. code: OpenAI's name of the error, where it has one; otherwise the status.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})
        self.code: str | int = code or status

    def body(self) -> dict[str, Any]:
        """The error object that the openai SDK maps to its exception classes."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def context_length_error(what: str, *, limit: int, param: str) -> ApiError:
    """A prompt that leaves no position for an answer. what: the prompt's length. limit: positions of the model.

    Clients look for the code, or for these words in the message, to shorten the conversation and ask again.
    """
    return ApiError(
        f"this model's maximum context length is {limit} tokens; {what}. Start a new conversation, or shorten it",
        param=param,
        code="context_length_exceeded",
    )


def unavailable_error(message: str) -> ApiError:
    """A 503 with Retry-After."""
    return ApiError(message, status=503, headers={"Retry-After": "2"})

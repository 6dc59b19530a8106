"""Response bodies in OpenAI's form: complete responses and stream chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_share4v.infer.request import TokenLogprobs
from megatron_share4v.serve.generation import ChoiceDelta, Generation, Token
from megatron_share4v.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # JSON has no -inf
DONE = "data: [DONE]\n\n"


def to_json(value: Any) -> str:
    """Serialise as one line of strict JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {to_json(value)}\n\n"


def usage(generation: Generation) -> dict[str, int]:
    """Token counts of a request; image positions count as prompt tokens."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the response or chunks of one request. chat: /v1/chat/completions, else /v1/completions."""

    model: str
    chat: bool
    tokenizer: Tokenizer
    wants_logprobs: bool
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        """Body of a non-streaming response."""
        return {**self._frame("chat.completion"), "choices": list(choices), "usage": counts}

    def chunk(self, choices: Sequence[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        """One stream chunk; the last one has counts and no choices."""
        body = {**self._frame("chat.completion.chunk"), "choices": list(choices)}
        return body if counts is None else {**body, "usage": counts}

    def choice(self, index: int, text: str, finish: str | None, tokens: Sequence[Token]) -> dict[str, Any]:
        """A finished choice; for a text completion stream also a part of one."""
        logprobs = self._logprobs(tokens) if self.wants_logprobs else None
        if self.chat:
            return {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "logprobs": logprobs,
                "finish_reason": finish,
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """First chunk of a chat choice, with the role."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def parts(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Chunk choices of one delta: text, then the finish reason in a chunk of its own. Empty without new content."""
        tokens = (*delta.prompt, *delta.tokens)
        if not self.chat:
            has_content = delta.text or delta.finish_reason or (self.wants_logprobs and tokens)
            return [self.choice(delta.index, delta.text, delta.finish_reason, tokens)] if has_content else []
        logprobs = self._logprobs(tokens) if self.wants_logprobs and tokens else None
        parts = []
        if delta.text or logprobs:
            parts.append(
                {"index": delta.index, "delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None}
            )
        if delta.finish_reason:
            parts.append({"index": delta.index, "delta": {}, "logprobs": None, "finish_reason": delta.finish_reason})
        return parts

    def _frame(self, kind: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._entry(token.token_id, token.logprobs) for token in tokens if token.logprobs]}
        names, values, tops, offsets = [], [], [], []
        for token in tokens:
            name = self._name(token.token_id)
            names.append(name)
            offsets.append(token.offset)
            values.append(None if token.logprobs is None else _number(token.logprobs.chosen))
            tops.append(
                None
                if token.logprobs is None
                else {self._name(i): _number(value) for i, value in _with_chosen(token.token_id, token.logprobs)}
            )
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _entry(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        own = self._alternative(token_id, logprobs.chosen)
        return {**own, "top_logprobs": [self._alternative(i, value) for i, value in logprobs.top]}

    def _alternative(self, token_id: int, value: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": _number(value),
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }

    def _name(self, token_id: int) -> str:
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in data)


def _with_chosen(token_id: int, logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    """The alternatives, and the token itself where it is not among them."""
    top = list(logprobs.top)
    return top if any(i == token_id for i, _ in top) else [*top, (token_id, logprobs.chosen)]


def _number(value: float) -> float:
    return max(value, MIN_LOGPROB)

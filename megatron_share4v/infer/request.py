"""Request and event records of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_share4v.data.loading.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends, after vLLM's SamplingParams.

    temperature: up to 0.001 means greedy. top_k: 0 means off. logprobs: number of alternatives per token, None for
    none. stop_ids end the answer and are not part of it. ignore_eos: the model's end tokens do not end it. min_tokens:
    no stop before this many.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue. `id` is chosen by the caller and unique among requests in flight."""

    id: str
    prompt: Prompt
    sampling: SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of the chosen token, and the most likely (id, log-probability) pairs, descending."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenEvent:
    """Result of one step for one request.

    The end token is not part of the answer: it comes as token_id None with finish_reason "stop".
    prompt_logprobs: on the first event only, when requested; one entry per prompt position, None for the first.
    """

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

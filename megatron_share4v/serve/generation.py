"""Generation for one HTTP request: engine requests out, text deltas back, stop strings and usage."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_share4v.infer.request import GenerationRequest, SamplingParams, TokenLogprobs
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.engine_thread import EngineThread, RequestGroup, Tick
from megatron_share4v.serve.metrics import Metrics
from megatron_share4v.serve.prompt_builder import BuiltPrompt, room
from megatron_share4v.text.detokenizer import IncrementalDetokenizer

CONTEXT_TOKENS = 4  # of the prompt fed to the detokenizer before its continuation, for sentencepiece's spaces
INT64 = 2**63


@dataclass(frozen=True)
class Token:
    """A token of an answer, or of a prompt whose logprobs were requested."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class ChoiceDelta:
    """New text and tokens of one choice.

    prompt: on the first delta, the prompt's tokens when their logprobs were requested.
    """

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    prompt: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Order:
    """Generation options of one request: `choices` answers per prompt.

    max_tokens None: up to the context limit; 0: no tokens, only prompt logprobs.
    """

    sampling: SamplingParams
    max_tokens: int | None
    choices: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    continues: bool = False
    """The answer continues a text: its first token keeps its leading space."""


@dataclass
class _Choice:
    index: int
    request: GenerationRequest
    stream: IncrementalDetokenizer
    asked: BuiltPrompt
    tokens: int = 0
    last: float | None = None


class Generation:
    """Engine requests of one HTTP request, submitted on construction. Must be closed."""

    def __init__(
        self, worker: EngineThread, asked: Sequence[BuiltPrompt], order: Order, *, metrics: Metrics, param: str
    ) -> None:
        """Submit the requests.

        Raises ApiError: the prompt fills the context (`param` is named), the queue is full, or the model is not ready.
        """
        served = worker.require()
        self._metrics, self._order = metrics, order
        self._choices: dict[str, _Choice] = {}
        self._refused = False
        for number in range(len(asked) * order.choices):
            one = asked[number // order.choices]
            space = room(served, one.prompt, param=param)
            limit = max(1, min(space, space if order.max_tokens is None else order.max_tokens))
            seed = order.sampling.seed
            sampling = replace(
                order.sampling,
                max_new_tokens=limit,
                seed=None if seed is None else (seed + number + INT64) % (2 * INT64) - INT64,
            )
            after = one.prompt.token_ids[-CONTEXT_TOKENS:].tolist() if order.continues else []
            stream = IncrementalDetokenizer(served.encoder.tokenizer, order.stop, order.include_stop, after=after)
            request = GenerationRequest(uuid.uuid4().hex, one.prompt, sampling)
            self._choices[request.id] = _Choice(index=number, request=request, stream=stream, asked=one)
        self.prompt_tokens = sum(one.prompt.token_ids.numel() for one in asked)
        self._job: RequestGroup = worker.submit([choice.request for choice in self._choices.values()])

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.tokens for choice in self._choices.values())

    def close(self) -> None:
        """Cancel the running requests. The creator must call this."""
        self._metrics.count_finished("error" if self._refused else "abort", len(self._job.open))
        self._job.close()

    async def pieces(self) -> AsyncIterator[ChoiceDelta]:
        """Yield the deltas of all choices as they come. Raises ApiError."""
        async for tick in self._events():
            choice = self._choices[tick.request_id]
            piece = self._piece(choice, tick)
            if piece.finish_reason is not None:
                self._job.cancel(tick.request_id)
                self._metrics.count_finished(piece.finish_reason)
                self._metrics.end_to_end.observe(tick.at - self._job.submitted)
            yield piece

    async def _events(self) -> AsyncIterator[Tick]:
        try:
            async for tick in self._job.events():
                yield tick
        except ApiError:
            self._refused = True
            raise

    def _piece(self, choice: _Choice, tick: Tick) -> ChoiceDelta:
        event, finish, tokens, text = tick.event, tick.event.finish_reason, (), ""
        if event.token_id is not None and self._order.max_tokens != 0:
            self._observe_latency(choice, tick.at)
            choice.tokens += 1
            tokens = (Token(event.token_id, event.logprobs),)
            text = choice.stream.feed([event.token_id])
        if finish is not None:
            text += choice.stream.finish()
        if choice.stream.stopped is not None:
            finish = "stop"
        elif self._order.max_tokens == 0:
            finish = "length"
        prompt: tuple[Token, ...] = ()
        if event.prompt_logprobs is not None:
            ids = choice.asked.prompt.token_ids.tolist()
            prompt = tuple(Token(i, logprobs) for i, logprobs in zip(ids, event.prompt_logprobs, strict=True))
        return ChoiceDelta(choice.index, text, tokens, finish, prompt)

    def _observe_latency(self, choice: _Choice, at: float) -> None:
        if choice.last is None:
            self._metrics.time_to_first_token.observe(at - self._job.submitted)
        else:
            self._metrics.inter_token_latency.observe(at - choice.last)
        choice.last = at

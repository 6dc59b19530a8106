"""Generation for one HTTP request: engine requests out, text deltas back, stop strings and usage."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_share4v.infer.request import GenerationRequest, TokenEvent, TokenLogprobs
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.engine_thread import EngineThread, RequestGroup
from megatron_share4v.serve.metrics import Metrics
from megatron_share4v.serve.prompt_builder import BuiltPrompt, remaining_positions
from megatron_share4v.serve.protocol import GenerationOptions
from megatron_share4v.text.detokenizer import IncrementalDetokenizer

CONTEXT_TOKENS = 4  # of the prompt fed to the detokenizer before its continuation, for sentencedelta's spaces
INT64 = 2**63


@dataclass(frozen=True)
class Token:
    """A token of an answer, or of a prompt whose logprobs were requested.

    offset: position in the choice's text, echoed prompt included, of the text that it adds; a token that completes no
    character has that of the character.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int = 0


@dataclass(frozen=True)
class ChoiceDelta:
    """New text and tokens of one choice.

    prompt: on the first delta, the prompt's tokens when their logprobs were requested.
    """

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    prompt: tuple[Token, ...] = ()


@dataclass
class _Choice:
    index: int
    request: GenerationRequest
    stream: IncrementalDetokenizer
    built: BuiltPrompt
    tokens: int = 0
    last: float | None = None


class Generation:
    """Engine requests of one HTTP request, submitted on construction. Must be closed."""

    def __init__(
        self,
        worker: EngineThread,
        prompts: Sequence[BuiltPrompt],
        options: GenerationOptions,
        *,
        metrics: Metrics,
        param: str,
        continues_text: bool,
    ) -> None:
        """Submit the requests.

        Raises ApiError: the prompt fills the context (`param` is named), the queue is full, or the model is not ready.
        """
        served = worker.require()
        self._metrics, self._options = metrics, options
        self._choices: dict[str, _Choice] = {}
        self._failed = False
        self._first: float | None = None
        self._finishes: set[str] = set()
        for number in range(len(prompts) * options.choices):
            one = prompts[number // options.choices]
            space = remaining_positions(served, one.prompt, param=param)
            limit = max(1, min(space, space if options.max_tokens is None else options.max_tokens))
            seed = options.sampling.seed
            sampling = replace(
                options.sampling,
                max_new_tokens=limit,
                seed=None if seed is None else (seed + number + INT64) % (2 * INT64) - INT64,
            )
            after = one.prompt.token_ids[-CONTEXT_TOKENS:].tolist() if continues_text else []
            stream = IncrementalDetokenizer(served.encoder.tokenizer, options.stop, options.include_stop, after=after)
            request = GenerationRequest(uuid.uuid4().hex, one.prompt, sampling)
            self._choices[request.id] = _Choice(index=number, request=request, stream=stream, built=one)
        self.prompt_tokens = sum(one.prompt.token_ids.numel() for one in prompts)
        self._group: RequestGroup = worker.submit([choice.request for choice in self._choices.values()])

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.tokens for choice in self._choices.values())

    def summary(self) -> dict[str, object]:
        """Counts and times for the log."""
        prompts = {id(choice.built): choice.built.prompt for choice in self._choices.values()}.values()
        first = "-" if self._first is None else round((self._first - self._group.submitted) * 1000)
        return {
            "prompt_tokens": self.prompt_tokens,
            "images": sum(prompt.pixels.size(0) for prompt in prompts),
            "completion_tokens": self.completion_tokens,
            "finish": ",".join(sorted(self._finishes)) or "aborted",
            "first_token_ms": first,
        }

    def close(self) -> None:
        """Cancel the running requests. The creator must call this."""
        self._metrics.count_finished("error" if self._failed else "abort", len(self._group.open))
        self._group.close()

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """Yield the deltas of all choices as they come. Raises ApiError."""
        async for event, time_s in self._events():
            choice = self._choices[event.request_id]
            delta = self._make_delta(choice, event, time_s)
            if delta.finish_reason is not None:
                self._finishes.add(delta.finish_reason)
                self._group.cancel(event.request_id)
                self._metrics.count_finished(delta.finish_reason)
                self._metrics.end_to_end.observe(time_s - self._group.submitted)
            yield delta

    async def _events(self) -> AsyncIterator[tuple[TokenEvent, float]]:
        try:
            async for output in self._group.events():
                yield output
        except ApiError:
            self._failed = True
            raise

    def _make_delta(self, choice: _Choice, event: TokenEvent, time_s: float) -> ChoiceDelta:
        finish, text = event.finish_reason, ""
        tokens: tuple[Token, ...] = ()
        if event.token_id is not None and self._options.max_tokens != 0:
            self._observe_latency(choice, time_s)
            choice.tokens += 1
            tokens = (Token(event.token_id, event.logprobs, len(choice.built.echo) + choice.stream.decoded),)
            text = choice.stream.feed([event.token_id])
        if finish is not None:
            text += choice.stream.finish()
        if choice.stream.stopped is not None:
            finish = "stop"
        elif self._options.max_tokens == 0:
            finish = "length"
        prompt: tuple[Token, ...] = ()
        if event.prompt_logprobs is not None:
            ids = choice.built.prompt.token_ids.tolist()
            offsets = choice.built.offsets or [0] * len(ids)
            prompt = tuple(map(Token, ids, event.prompt_logprobs, offsets))
        return ChoiceDelta(choice.index, text, tokens, finish, prompt)

    def _observe_latency(self, choice: _Choice, at: float) -> None:
        if choice.last is None:
            self._first = self._first or at
            self._metrics.time_to_first_token.observe(at - self._group.submitted)
        else:
            self._metrics.inter_token_latency.observe(at - choice.last)
        choice.last = at

"""OpenAI's request bodies: what /v1/chat/completions and /v1/completions accept. Responses are in responses.py.

vLLM's extra fields (top_k, min_p, repetition_penalty, stop_token_ids, ...) are accepted beside OpenAI's.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_share4v.infer.request import SamplingParams
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.json_fields import JsonFields
from megatron_share4v.serve.messages import Conversation, read_conversation

MAX_PROMPTS = 128
MAX_STOPS, MAX_STOP_IDS, MAX_STOP_LENGTH = 4, 64, 256
MAX_ALTERNATIVES = 20
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Generation options. choices: answers per prompt.

    max_tokens None: up to the context limit; 0: no tokens, only prompt logprobs.
    """

    sampling: SamplingParams
    max_tokens: int | None
    choices: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """A parsed chat request."""

    conversation: Conversation
    options: GenerationOptions


@dataclass(frozen=True)
class CompletionRequest:
    """A parsed text completion request. prompts: texts or ids. add_bos: whether a text is preceded by <s>."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    add_bos: bool
    options: GenerationOptions


@dataclass(frozen=True)
class RequestLimits:
    """Limits from the served model and the configuration."""

    vocab_size: int
    end_ids: frozenset[int]
    max_images: int
    max_choices: int


def read_chat(fields: JsonFields, limits: RequestLimits) -> ChatRequest:
    """Parse a chat request. Raises ApiError."""
    conversation = read_conversation(fields, max_images=limits.max_images)
    logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, low=0, high=MAX_ALTERNATIVES)
    if top and not logprobs:
        raise fields.refuse("logprobs", "true where top_logprobs is given")
    max_tokens = fields.integer("max_tokens", None, low=1)
    limit = fields.integer("max_completion_tokens", max_tokens, low=1)
    if max_tokens is not None and limit != max_tokens:
        raise fields.refuse("max_tokens", f"equal to max_completion_tokens ({limit}), or left out")
    options = _options(fields, limits, max_tokens=limit, logprobs=top if logprobs else None)
    return ChatRequest(conversation=conversation, options=options)


def read_completion(fields: JsonFields, limits: RequestLimits) -> CompletionRequest:
    """Parse a text completion request. Raises ApiError."""
    echo = fields.boolean("echo")
    max_tokens = fields.integer("max_tokens", COMPLETION_TOKENS, low=0 if echo else 1)
    logprobs = fields.integer("logprobs", None, low=0, high=MAX_ALTERNATIVES)
    options = _options(
        fields, limits, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=echo and logprobs is not None
    )
    prompts = _prompts(fields, vocab_size=limits.vocab_size)
    if len(prompts) * options.choices > limits.max_choices:
        raise ApiError(
            f"{len(prompts)} prompts x n {options.choices} is more than the {limits.max_choices} answers of one "
            "request",
            param="prompt",
        )
    add_bos = fields.boolean("add_special_tokens", True)
    return CompletionRequest(prompts=prompts, echo=echo, add_bos=add_bos, options=options)


def _temperature(fields: JsonFields, *, top_p: float) -> float:
    """Temperature, 0 for greedy decoding. top_p 0 keeps only the most likely token: greedy at any temperature."""
    temperature = fields.number("temperature", 1.0, low=0, high=100) if top_p > 0 else 0.0
    if not fields.has("do_sample"):
        return temperature
    if not fields.boolean("do_sample"):
        return 0.0
    if not temperature:
        raise fields.refuse("do_sample", "false or left out where temperature or top_p is 0, which is greedy")
    return temperature


def _options(
    fields: JsonFields,
    limits: RequestLimits,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> GenerationOptions:
    stream_options = fields.child("stream_options")
    stream = fields.boolean("stream")
    if fields.has("stream_options") and not stream:
        raise ApiError("stream_options is for stream: true only", param="stream_options")
    top_p = fields.number("top_p", 1.0, low=0, high=1)
    top_k = fields.integer("top_k", 0, low=-1)
    ignore_eos = fields.boolean("ignore_eos")
    min_tokens = fields.integer("min_tokens", 0, low=0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise fields.refuse("min_tokens", f"at most max_tokens ({max_tokens})")
    sampling = SamplingParams(
        max_new_tokens=max(1, max_tokens or 1),
        temperature=_temperature(fields, top_p=top_p),
        top_p=top_p or 1.0,
        top_k=max(top_k, 0),
        min_p=fields.number("min_p", 0.0, low=0, high=1),
        repetition_penalty=fields.number("repetition_penalty", 1.0, low=0, high=10, above=True),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2, high=2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2, high=2),
        seed=fields.integer("seed"),
        stop_ids=_stop_ids(fields, limits) | (frozenset() if ignore_eos else limits.end_ids),
        ignore_eos=ignore_eos,
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    choices = fields.integer("n", 1, low=1, high=limits.max_choices)
    if fields.integer("best_of", choices) != choices:
        raise fields.refuse("best_of", f"equal to n ({choices}), or left out")
    return GenerationOptions(
        max_tokens=max_tokens,
        choices=choices,
        sampling=sampling,
        stop=_stops(fields),
        include_stop=fields.boolean("include_stop_str_in_output"),
        stream=stream,
        include_usage=stream_options.boolean("include_usage"),
        continuous_usage=stream_options.boolean("continuous_usage_stats"),
    )


def _stop_ids(fields: JsonFields, limits: RequestLimits) -> frozenset[int]:
    ids = fields.items("stop_token_ids", longest=MAX_STOP_IDS, kind=int)
    if not all(0 <= i < limits.vocab_size for i in ids):
        raise ApiError(
            f"stop_token_ids must be below {limits.vocab_size}, the size of the vocabulary", param="stop_token_ids"
        )
    return frozenset(ids)


def _stops(fields: JsonFields) -> tuple[str, ...]:
    if isinstance(fields.values.get("stop"), str):
        stops = [fields.text("stop")]
    else:
        stops = fields.items("stop", longest=MAX_STOPS, kind=str)
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ApiError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters", param="stop")
    return tuple(stops)


def _prompts(fields: JsonFields, *, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    value = fields.values.get("prompt")
    if isinstance(value, str):
        return (fields.text("prompt"),)
    if not isinstance(value, list) or not value:
        raise fields.refuse("prompt", "a string, token ids, or an array of one of them")
    if type(value[0]) is int:
        return (_ids(value, "prompt", vocab_size),)
    if len(value) > MAX_PROMPTS:
        raise fields.refuse("prompt", f"at most {MAX_PROMPTS} prompts")
    if all(type(one) is str for one in value):
        return tuple(fields.items("prompt", longest=MAX_PROMPTS, kind=str))
    return tuple(_ids(one, f"prompt[{place}]", vocab_size) for place, one in enumerate(value))


def _ids(value: object, name: str, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(i) is int and 0 <= i < vocab_size for i in value):
        raise ApiError(f"{name} must be a string or an array of token ids, each from 0 to {vocab_size - 1}", param=name)
    return tuple(value)

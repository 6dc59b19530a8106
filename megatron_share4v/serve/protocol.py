"""OpenAI's request bodies: what /v1/chat/completions and /v1/completions accept. Responses are in responses.py.

vLLM's extra fields (top_k, min_p, repetition_penalty, stop_token_ids, ...) are accepted beside OpenAI's.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_share4v.infer.request import SamplingParams
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.json_fields import JsonFields
from megatron_share4v.text.template import GPT, HUMAN

MAX_MESSAGES, MAX_PARTS, MAX_PROMPTS = 1024, 64, 128
MAX_STOPS, MAX_STOP_IDS, MAX_STOP_LENGTH = 4, 64, 256
MAX_ALTERNATIVES = 20
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# Unsupported fields, with the values that have no effect.
_INERT: dict[str, tuple] = {
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "structured_outputs": (),
    "prompt_embeds": (),
    "audio": (),
}
_COMMON = frozenset(
    [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "echo",
        "user",
        "best_of",
    ]
)
KNOWN = _COMMON | frozenset(_INERT)


@dataclass(frozen=True)
class Message:
    """One message. image: URL of its image. place: dotted name in the request."""

    role: str
    text: str
    image: str | None
    place: str


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
    """A parsed chat request. system None: the template's own."""

    system: str | None
    messages: tuple[Message, ...]
    options: GenerationOptions


@dataclass(frozen=True)
class CompletionRequest:
    """A parsed text completion request. prompts: texts or ids."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    options: GenerationOptions


@dataclass(frozen=True)
class RequestLimits:
    """Limits from the served model and the configuration."""

    vocab_size: int
    eos_id: int
    max_images: int
    max_choices: int


def read_chat(fields: JsonFields, limits: RequestLimits) -> ChatRequest:
    """Parse a chat request. Raises ApiError."""
    _reject_unsupported(fields)
    system, messages = read_messages(fields, max_images=limits.max_images)
    logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, low=0, high=MAX_ALTERNATIVES)
    if top and not logprobs:
        raise fields.refuse("logprobs", "true where top_logprobs is given")
    limit_key = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    options = _options(
        fields, limits, max_tokens=fields.integer(limit_key, None, low=1), logprobs=top if logprobs else None
    )
    return ChatRequest(system=system, messages=messages, options=options)


def read_completion(fields: JsonFields, limits: RequestLimits) -> CompletionRequest:
    """Parse a text completion request. Raises ApiError."""
    _reject_unsupported(fields)
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
    return CompletionRequest(prompts=prompts, echo=echo, options=options)


def _reject_unsupported(fields: JsonFields) -> None:
    for name, inert in _INERT.items():
        if fields.has(name) and fields.values[name] not in inert:
            raise ApiError(f"{fields.name(name)} is not supported by this server; leave it out", param=name)
    if fields.has("best_of") and fields.values["best_of"] != (fields.values.get("n") or 1):
        raise ApiError("best_of other than n is not supported by this server; leave it out", param="best_of")


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
    temperature, top_p = fields.number("temperature", 1.0, low=0, high=100), fields.number("top_p", 1.0, low=0, high=1)
    top_k = fields.integer("top_k", 0, low=-1)
    ignore_eos = fields.boolean("ignore_eos")
    min_tokens = fields.integer("min_tokens", 0, low=0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise fields.refuse("min_tokens", f"at most max_tokens ({max_tokens})")
    sampling = SamplingParams(
        max_new_tokens=max(1, max_tokens or 1),
        # top_p 0 keeps only the most likely token: greedy at any temperature.
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p or 1.0,
        top_k=max(top_k, 0),
        min_p=fields.number("min_p", 0.0, low=0, high=1),
        repetition_penalty=fields.number("repetition_penalty", 1.0, low=0, high=10, above=True),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2, high=2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2, high=2),
        seed=fields.integer("seed"),
        stop_ids=_stop_ids(fields, limits) | (frozenset() if ignore_eos else frozenset({limits.eos_id})),
        ignore_eos=ignore_eos,
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return GenerationOptions(
        max_tokens=max_tokens,
        choices=fields.integer("n", 1, low=1, high=limits.max_choices),
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
        stops = [fields.values["stop"]]
    else:
        stops = fields.items("stop", longest=MAX_STOPS, kind=str)
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ApiError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters", param="stop")
    return tuple(stops)


def _prompts(fields: JsonFields, *, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    value = fields.values.get("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise fields.refuse("prompt", "a string, token ids, or an array of one of them")
    if type(value[0]) is int:
        return (_ids(value, "prompt", vocab_size),)
    if len(value) > MAX_PROMPTS:
        raise fields.refuse("prompt", f"at most {MAX_PROMPTS} prompts")
    if all(type(one) is str for one in value):
        return tuple(value)
    return tuple(_ids(one, f"prompt[{place}]", vocab_size) for place, one in enumerate(value))


def _ids(value: object, name: str, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(i) is int and 0 <= i < vocab_size for i in value):
        raise ApiError(f"{name} must be a string or an array of token ids, each from 0 to {vocab_size - 1}", param=name)
    return tuple(value)


def read_messages(fields: JsonFields, *, max_images: int) -> tuple[str | None, tuple[Message, ...]]:
    """The system prompt (None when no message gives one) and the other messages. Raises ApiError."""
    entries = [
        JsonFields.of(entry, f"messages[{place}]")
        for place, entry in enumerate(fields.items("messages", shortest=1, longest=MAX_MESSAGES, kind=dict))
    ]
    messages = [_message(entry) for entry in entries]
    system = None
    if messages[0].role == "system":
        system = messages.pop(0).text
    for place, message in enumerate(messages):
        if message.role == "system":
            raise ApiError(f"{message.place}: a system message must be the first", param=message.place)
        if message.role != (HUMAN, GPT)[place % 2]:
            raise ApiError(
                f"{message.place}: after an optional system message, user and assistant must take turns, a user first",
                param=message.place,
            )
    if not messages or messages[-1].role != HUMAN:
        raise ApiError("messages must end with one by the user, to be answered", param="messages")
    images = sum(message.image is not None for message in messages)
    if images > max_images:
        raise ApiError(
            f"the conversation has {images} images; this server takes {max_images} per conversation", param="messages"
        )
    return system, tuple(messages)


_ROLES = {"system": "system", "developer": "system", "user": HUMAN, "assistant": GPT}


def _message(entry: JsonFields) -> Message:
    role = _ROLES.get(entry.text("role", ""))
    if role is None:
        raise entry.refuse("role", f"one of {', '.join(_ROLES)}")
    content = entry.values.get("content")
    if isinstance(content, str):
        text, image = content, None
    else:
        parts = entry.items("content", shortest=1, longest=MAX_PARTS, kind=dict)
        text, image = _parts(
            [JsonFields.of(part, f"{entry.name('content')}[{place}]") for place, part in enumerate(parts)], entry
        )
    if image is not None and role != HUMAN:
        raise ApiError(f"{entry.path}: only a user's message can have an image", param=entry.path)
    if not text and image is None and role != "system":
        raise ApiError(
            f"{entry.name('content')} is empty; write something, or leave the message out", param=entry.name("content")
        )
    return Message(role=role, text=text, image=image, place=entry.path)


def _parts(parts: list[JsonFields], entry: JsonFields) -> tuple[str, str | None]:
    texts, images = [], []
    for part in parts:
        kind = part.text("type", "")
        if kind == "text":
            texts.append(part.text("text", ""))
        elif kind == "image_url":
            url = part.values.get("image_url")
            images.append(url if isinstance(url, str) else part.child("image_url").text("url", ""))
        else:
            raise part.refuse("type", "text or image_url")
    if len(images) > 1:
        raise ApiError(f"{entry.path} has {len(images)} images; a message can have one", param=entry.name("content"))
    return "\n".join(text for text in texts if text), images[0] if images else None

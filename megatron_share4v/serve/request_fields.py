"""Fields of a request body by their effect: honoured, without effect on the answer, or refused with a remedy.

A field that would change the answer and is not supported is refused, whatever API it comes from: the client would take
the answer for what it asked for. Fields that no known API has are ignored, except for near misses of honoured names
(`max_token`) and for names that speak of an image or a file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.json_fields import JsonFields, format_value

MAX_FIELDS = 128
MAX_COMPARED = 8
SIMILAR = 0.85


@dataclass(frozen=True)
class RouteFields:
    """Fields that a route honours. generates: whether fields of the other generating routes would change its answer."""

    path: str
    names: frozenset[str]
    generates: bool = True


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON = _words(
    "model max_tokens n seed stop stop_token_ids include_stop_str_in_output ignore_eos min_tokens temperature top_p"
    " top_k min_p repetition_penalty presence_penalty frequency_penalty do_sample stream stream_options logprobs"
    " best_of"
)
CHAT = RouteFields(
    "/v1/chat/completions", _COMMON | {"messages", "max_completion_tokens", "top_logprobs", "split_special_tokens"}
)
COMPLETION = RouteFields("/v1/completions", _COMMON | {"prompt", "echo", "add_special_tokens"})
MEGATRON = RouteFields(
    "/api",
    _words(
        "prompts images tokens_to_generate logprobs temperature top_k top_p top_p_decay top_p_bound add_BOS"
        " stop_on_eol stop_on_double_eol prevent_newline_after_colon stop_token random_seed length_penalty max_len"
        " sentences beam_width"
    ),
)
TOKENIZE = RouteFields(
    "/tokenize",
    frozenset({"model", "prompt", "messages", "add_special_tokens", "return_token_strs", "split_special_tokens"}),
    generates=False,
)
DETOKENIZE = RouteFields("/detokenize", frozenset({"model", "tokens"}), generates=False)
_GENERATING = (CHAT, COMPLETION, MEGATRON)
NO_EFFECT = _words(
    "cache_salt keep_alive mcp_servers metadata parallel_tool_calls prediction priority prompt_cache_key"
    " prompt_cache_retention request_id safety_identifier service_tier spaces_between_special_tokens store user"
)
"""Accepted: bookkeeping, caching and speed, or of use only with a field that is refused."""

_LEAVE_OUT = "leave it out"
_TOP_LEVEL = "write its content at the top level of the body"
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    # OpenAI
    "audio": ((), _LEAVE_OUT),
    "echo": ((False,), "it is for /v1/completions"),
    "function_call": (("none", "auto"), _LEAVE_OUT),
    "functions": ((), _LEAVE_OUT),
    "input": ((), "use messages"),
    "instructions": ((), "use a message of role system"),
    "logit_bias": ((), _LEAVE_OUT),
    "max_completion_tokens": ((), "use max_tokens"),
    "max_output_tokens": ((), "use max_tokens"),
    "messages": ((), "use /v1/chat/completions"),
    "modalities": ((["text"],), "answers are text"),
    "prompt": ((), "use messages, or /v1/completions"),
    "reasoning_effort": (("none",), _LEAVE_OUT),
    "response_format": (({"type": "text"},), _LEAVE_OUT),
    "suffix": ((), _LEAVE_OUT),
    "tool_choice": (("none", "auto"), _LEAVE_OUT),
    "tools": ((), _LEAVE_OUT),
    "top_logprobs": ((0,), "use logprobs"),
    "verbosity": (("medium",), _LEAVE_OUT),
    "web_search_options": ((), _LEAVE_OUT),
    # vLLM and SGLang
    "add_generation_prompt": ((True,), _LEAVE_OUT),
    "add_special_tokens": ((False,), "the conversation template has its own"),
    "allowed_token_ids": ((), _LEAVE_OUT),
    "bad_words": ((), _LEAVE_OUT),
    "chat_template": ((), "the conversation template is the checkpoint's"),
    "chat_template_kwargs": ((), "the conversation template is the checkpoint's"),
    "continue_final_message": ((False,), "use /v1/completions to continue a text"),
    "custom_logit_processor": ((), _LEAVE_OUT),
    "documents": ((), "write them into a message"),
    "ebnf": ((), _LEAVE_OUT),
    "json_schema": ((), _LEAVE_OUT),
    "kv_transfer_params": ((), _LEAVE_OUT),
    "length_penalty": ((1, 0), "there is no beam search"),
    "logits_processors": ((), _LEAVE_OUT),
    "lora_path": ((), _LEAVE_OUT),
    "mm_processor_kwargs": ((), "images are preprocessed as in training"),
    "prompt_embeds": ((), _LEAVE_OUT),
    "prompt_logprobs": ((), "use echo and logprobs of /v1/completions"),
    "regex": ((), _LEAVE_OUT),
    "return_token_ids": ((False,), "use /tokenize on the text"),
    "return_tokens_as_token_ids": ((False,), _LEAVE_OUT),
    "skip_special_tokens": ((True,), _LEAVE_OUT),
    "stop_regex": ((), "use stop"),
    "structural_tag": ((), _LEAVE_OUT),
    "structured_outputs": ((), _LEAVE_OUT),
    "thinking_token_budget": ((), _LEAVE_OUT),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "use_beam_search": ((False,), "there is no beam search"),
    "vllm_xargs": ((), _LEAVE_OUT),
    # transformers and text-generation-inference
    "assistant_model": ((), _LEAVE_OUT),
    "bad_words_ids": ((), _LEAVE_OUT),
    "best_of": ((1,), _LEAVE_OUT),
    "constraints": ((), _LEAVE_OUT),
    "decoder_input_details": ((False,), _LEAVE_OUT),
    "diversity_penalty": ((0,), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "encoder_no_repeat_ngram_size": ((0,), _LEAVE_OUT),
    "encoder_repetition_penalty": ((1,), _LEAVE_OUT),
    "epsilon_cutoff": ((0,), _LEAVE_OUT),
    "eta_cutoff": ((0,), _LEAVE_OUT),
    "exponential_decay_length_penalty": ((), _LEAVE_OUT),
    "force_words_ids": ((), _LEAVE_OUT),
    "forced_bos_token_id": ((), _LEAVE_OUT),
    "forced_eos_token_id": ((), _LEAVE_OUT),
    "grammar": ((), _LEAVE_OUT),
    "guidance_scale": ((1,), _LEAVE_OUT),
    "max_length": ((), "use max_tokens, which does not count the prompt"),
    "max_new_tokens": ((), "use max_tokens"),
    "max_time": ((), _LEAVE_OUT),
    "min_length": ((0,), "use min_tokens"),
    "min_new_tokens": ((0,), "use min_tokens"),
    "no_repeat_ngram_size": ((0,), _LEAVE_OUT),
    "num_beam_groups": ((1,), "there is no beam search"),
    "num_beams": ((1,), "there is no beam search"),
    "num_return_sequences": ((1,), "use n"),
    "penalty_alpha": ((0,), _LEAVE_OUT),
    "repetition_context_size": ((), _LEAVE_OUT),
    "return_full_text": ((False,), "use echo of /v1/completions"),
    "sequence_bias": ((), _LEAVE_OUT),
    "stop_sequences": ((), "use stop"),
    "stop_strings": ((), "use stop"),
    "suppress_tokens": ((), _LEAVE_OUT),
    "temperature_last": ((False,), _LEAVE_OUT),
    "top_h": ((), _LEAVE_OUT),
    "truncate": ((), "shorten the prompt"),
    "typical_p": ((1,), _LEAVE_OUT),
    "watermark": ((False,), _LEAVE_OUT),
    # llama.cpp and Ollama
    "dynatemp_range": ((0,), _LEAVE_OUT),
    "format": ((), _LEAVE_OUT),
    "mirostat": ((0,), _LEAVE_OUT),
    "n_predict": ((), "use max_tokens"),
    "num_ctx": ((), "--max-positions sets the length of the context"),
    "num_predict": ((), "use max_tokens"),
    "raw": ((False,), "use /v1/completions"),
    "repeat_penalty": ((1,), "use repetition_penalty"),
    "system": ((), "use a message of role system"),
    "template": ((), "the conversation template is the checkpoint's"),
    "tfs_z": ((1,), _LEAVE_OUT),
    "think": ((False,), _LEAVE_OUT),
    "thinking": ((False,), _LEAVE_OUT),
    "top_a": ((0,), _LEAVE_OUT),
    "top_n_sigma": ((), _LEAVE_OUT),
    # Keys of a message
    "parts": ((), "use content"),
    "prefix": ((False,), "use /v1/completions to continue a text"),
    "partial": ((False,), "use /v1/completions to continue a text"),
    "refusal": ((), "use content"),
    "source": ((), _LEAVE_OUT),
    "tool_call_id": ((), _LEAVE_OUT),
    "tool_calls": ((), _LEAVE_OUT),
    # Objects that hold the fields of another API, or of openai's SDK
    "extra_body": ((), f"it is an argument of openai's SDK; {_TOP_LEVEL}"),
    "generation_config": ((), _TOP_LEVEL),
    "options": ((), _TOP_LEVEL),
    "parameters": ((), _TOP_LEVEL),
    "sampling_params": ((), _TOP_LEVEL),
}
"""Name: values without effect, and what to do instead. null and empty values have no effect for any of them."""
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_UNSUPPORTED_PREFIXES = ("guided_", "dry_", "xtc_")
_MEDIA = _words("image img picture photo pixel video audio media file attachment")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_WHERE_IMAGES_GO = (
    "An image is a part of a message's content: "
    '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
)


def check_fields(fields: JsonFields, route: RouteFields) -> list[str]:
    """Return the names of unknown fields, which are ignored. Raises ApiError for a field that cannot be honoured."""
    if len(fields.values) > MAX_FIELDS:
        raise ApiError(f"the body has {len(fields.values)} fields; accepted are {MAX_FIELDS}")
    others = {name: one.path for one in _GENERATING for name in one.names}
    unknown = []
    for name in check_unsupported(fields, route.names):
        if name not in others:
            unknown.append(name)
        elif route.generates and fields.values[name] is not False:
            raise ApiError(f"{name} is a field of {others[name]}, not of {route.path}", param=name)
    for name in unknown[:MAX_COMPARED]:
        _check_spelling(fields, name, route)
    return unknown


def check_unsupported(fields: JsonFields, honoured: frozenset[str]) -> list[str]:
    """Return the names of unknown keys of an object in a request. Raises ApiError for one that asks for something."""
    unknown = []
    for name, value in fields.values.items():
        if name in honoured or name in NO_EFFECT or _is_among(value, _EMPTY):
            continue
        inert, remedy = _UNSUPPORTED.get(name, ((), _LEAVE_OUT))
        place = fields.name(name[:100])
        if name in _UNSUPPORTED or name.startswith(_UNSUPPORTED_PREFIXES):
            if not _is_among(value, inert):
                raise ApiError(
                    f"{place} ({format_value(value)}) is not supported by this server; {remedy}", param=place
                )
        elif value is not False and _names_media(name):
            raise ApiError(f"{place} is not read by this server; leave it out. {_WHERE_IMAGES_GO}", param=place)
        else:
            unknown.append(name)
    return unknown


def _names_media(name: str) -> bool:
    words = {word.lower() for word in _WORD.findall(name[:100])}
    return not _MEDIA.isdisjoint(words | {word.removesuffix("s") for word in words})


def _check_spelling(fields: JsonFields, name: str, route: RouteFields) -> None:
    known = {_bare(one): one for one in sorted(route.names)}
    near = difflib.get_close_matches(_bare(name), known, n=1, cutoff=SIMILAR)
    if near:
        place = fields.name(name[:100])
        raise ApiError(f"{place} is not a field; did you mean {known[near[0]]}?", param=place)


def _bare(name: str) -> str:
    return name[:64].replace("_", "").replace("-", "").casefold()


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a JSON value is one of `values`; unlike in Python, true is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def keys_of(values: Mapping[str, Any]) -> str:
    """Names of an object's keys, for an error message."""
    return ", ".join(format_value(name[:40]) for name in list(values)[:8]) or "none"

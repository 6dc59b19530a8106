"""Megatron-LM's text generation API, PUT /api, with its fields; invalid values get 400 and the error object.

Unlike the original, top_k and top_p can be combined, stop_token defaults to the model's end token, and prompts may
contain images: `images` holds a list of data URLs per prompt, one for each <image> in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_share4v.infer.request import SamplingParams
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.engine_thread import EngineThread, ServedModel
from megatron_share4v.serve.generation import Generation, Token
from megatron_share4v.serve.http import RECORD, BodyReader, JsonResponse, run_until_disconnect
from megatron_share4v.serve.json_fields import JsonFields
from megatron_share4v.serve.metrics import Metrics
from megatron_share4v.serve.prompt_builder import BuiltPrompt, PromptBuilder
from megatron_share4v.serve.protocol import GenerationOptions
from megatron_share4v.serve.request_fields import MEGATRON, check_fields
from megatron_share4v.serve.responses import MIN_LOGPROB
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

MAX_PROMPTS, MAX_SEED = 128, 2**63 - 1
_REJECTED = ("max_len", "sentences", "beam_width")  # names that Megatron-LM itself rejects
_INERT = {"top_p_decay": 0.0, "top_p_bound": 0.0, "length_penalty": 1.0, "prevent_newline_after_colon": False}


@dataclass
class MegatronRoutes:
    """Route of Megatron-LM's API."""

    worker: EngineThread
    bodies: BodyReader
    prompt_builder: PromptBuilder
    metrics: Metrics
    max_images: int

    def routes(self) -> list[Route]:
        """The Starlette routes."""
        return [Route("/api", self.generate, methods=["PUT"])]

    async def generate(self, request: Request) -> Response:
        """Handle PUT /api."""
        prompts, options, wants_logprobs = await self._read(request)
        if not prompts:
            return Response()  # the client has disconnected
        generation = Generation(
            self.worker, prompts, options, metrics=self.metrics, param="prompts", continues_text=True
        )
        request.scope[RECORD].generation = generation
        try:
            found = await run_until_disconnect(request.receive, _collect(generation, len(prompts)))
        finally:
            generation.close()
        if found is None:
            return Response()
        return JsonResponse(_response_body(self.worker.require(), prompts, found, wants_logprobs=wants_logprobs))

    async def _read(self, request: Request) -> tuple[list[BuiltPrompt], GenerationOptions, bool]:
        served = self.worker.require()
        async with self.bodies.read(request) as fields:
            check_fields(fields, MEGATRON)
            options, wants_logprobs = read_options(fields, served)
            texts = fields.items("prompts", shortest=1, longest=MAX_PROMPTS, kind=str)
            if not all(texts):
                raise ApiError("prompts must not be empty", param="prompts")
            images = _images(fields, texts, max_images=self.max_images)
            add_bos = fields.boolean("add_BOS")
            prompts = await run_until_disconnect(request.receive, self._prepare(served, texts, images, add_bos))
        return prompts or [], options, wants_logprobs

    async def _prepare(
        self, served: ServedModel, texts: list[str], images: list[list[str]], add_bos: bool
    ) -> list[BuiltPrompt]:
        prompts = []
        for number, (text, own) in enumerate(zip(texts, images)):
            pieces = text.split(IMAGE_PLACEHOLDER) if own else [text]
            prompts.append(
                await self.prompt_builder.with_images(served, pieces, own, place=f"prompts[{number}]", add_bos=add_bos)
            )
        return prompts


def read_options(fields: JsonFields, served: ServedModel) -> tuple[GenerationOptions, bool]:
    """Read the generation options, and whether logprobs are requested. Raises ApiError."""
    for name in _REJECTED:
        if fields.has(name):
            raise ApiError(f"{name} is not accepted; use tokens_to_generate and prompts, without beams", param=name)
    for name, inert in _INERT.items():
        if fields.has(name) and fields.values[name] != inert:
            raise ApiError(f"{name} other than {inert} is not supported by this server; leave it out", param=name)
    tokenizer = served.encoder.tokenizer
    tokens = fields.integer("tokens_to_generate", 64, low=0)
    wants_logprobs = fields.boolean("logprobs")
    if not tokens and not wants_logprobs:
        raise ApiError(
            "tokens_to_generate 0 needs logprobs true: the response would be empty", param="tokens_to_generate"
        )
    top_k = fields.integer("top_k", 0, low=0, high=1000)
    stops = [text for name, text in (("stop_on_eol", "\n"), ("stop_on_double_eol", "\n\n")) if fields.boolean(name)]
    stop_token = fields.integer("stop_token", None, low=0, high=tokenizer.vocab_size - 1)
    sampling = SamplingParams(
        max_new_tokens=max(1, tokens),
        temperature=0.0 if top_k == 1 else fields.number("temperature", 1.0, low=0, high=100, above=True),
        top_k=top_k,
        top_p=fields.number("top_p", 0.0, low=0, high=1) or 1.0,  # 0 is off, as in Megatron-LM
        seed=fields.integer("random_seed", None, low=0, high=MAX_SEED),
        stop_ids=served.encoder.stop_ids if stop_token is None else frozenset({stop_token}),
        logprobs=0 if wants_logprobs else None,
        prompt_logprobs=wants_logprobs,
    )
    options = GenerationOptions(sampling=sampling, max_tokens=tokens, stop=tuple(stops), include_stop=True)
    return options, wants_logprobs


def _images(fields: JsonFields, prompts: list[str], *, max_images: int) -> list[list[str]]:
    if not fields.has("images"):
        return [[] for _ in prompts]
    images = fields.items("images", shortest=len(prompts), longest=len(prompts), kind=list)
    for number, (prompt, own) in enumerate(zip(prompts, images)):
        place = f"images[{number}]"
        if len(own) > max_images or not all(type(url) is str for url in own):
            raise ApiError(f"{place} must be an array of at most {max_images} data URLs", param=place)
        if own and prompt.count(IMAGE_PLACEHOLDER) != len(own):
            raise ApiError(
                f"{place} has {len(own)} images and prompts[{number}] has {prompt.count(IMAGE_PLACEHOLDER)} "
                f"{IMAGE_PLACEHOLDER}",
                param=place,
            )
    return images


async def _collect(generation: Generation, count: int) -> list[tuple[str, list[Token], list[Token]]]:
    """Per prompt: the generated text, the prompt's tokens when logprobs are requested, and the generated tokens."""
    texts = [""] * count
    prompts: list[list[Token]] = [[] for _ in range(count)]
    tokens: list[list[Token]] = [[] for _ in range(count)]
    async for delta in generation.deltas():
        texts[delta.index] += delta.text
        prompts[delta.index] += delta.prompt
        tokens[delta.index] += delta.tokens
    return list(zip(texts, prompts, tokens))


def _response_body(
    served: ServedModel,
    prompts: list[BuiltPrompt],
    found: list[tuple[str, list[Token], list[Token]]],
    *,
    wants_logprobs: bool,
) -> dict[str, Any]:
    """Response body. `text`, `segments` and `tokens` cover prompt and continuation.

    `logprobs` has one entry less than `tokens`: the first token has no predecessor.
    """
    tokenizer = served.encoder.tokenizer
    ids = [
        [*one.prompt.token_ids.tolist(), *(token.token_id for token in new)] for one, (_, _, new) in zip(prompts, found)
    ]
    logprobs = [
        [MIN_LOGPROB if t.logprobs is None else max(t.logprobs.chosen, MIN_LOGPROB) for t in (*old, *new)][1:]
        for _, old, new in found
    ]
    return {
        "text": [tokenizer.decode(one.prompt.token_ids.tolist()) + text for one, (text, _, _) in zip(prompts, found)],
        "segments": [[tokenizer.token_bytes(i).decode("utf-8", "replace") for i in row] for row in ids],
        "tokens": ids,
        "logprobs": logprobs if wants_logprobs else None,
    }

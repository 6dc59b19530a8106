"""OpenAI's routes (chat and text completions, models) and vLLM's tokenize, detokenize and tokenizer_info."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_share4v import __version__
from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.logging import get_logger
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.engine_thread import EngineThread, ServedModel
from megatron_share4v.serve.generation import Generation, Token
from megatron_share4v.serve.http import BodyReader, EventStreamResponse, JsonResponse, run_until_disconnect
from megatron_share4v.serve.json_fields import JsonFields
from megatron_share4v.serve.metrics import Metrics
from megatron_share4v.serve.prompt_builder import BuiltPrompt, PromptBuilder
from megatron_share4v.serve.protocol import (
    KNOWN,
    GenerationOptions,
    RequestLimits,
    read_chat,
    read_completion,
    read_messages,
)
from megatron_share4v.serve.responses import DONE, ResponseBuilder, event, usage

MAX_DETOKENIZED = 1 << 20
MAX_NOTED = 256


@dataclass(frozen=True)
class _ParsedRequest:
    """Tokenized prompts and options of a request. Without prompts when the client has disconnected."""

    prompts: list[BuiltPrompt]
    options: GenerationOptions
    echo: bool = False


@dataclass
class OpenAIRoutes:
    """Handlers of OpenAI's and vLLM's routes. noted: unknown fields that have been logged."""

    config: ServeConfig
    worker: EngineThread
    bodies: BodyReader
    prompt_builder: PromptBuilder
    metrics: Metrics
    started: int
    noted: set[str] = field(default_factory=set)

    def routes(self) -> list[Route]:
        """The Starlette routes."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Response:
        """Handle POST /v1/chat/completions."""
        return await self._answer(request, await self._read_chat(request), chat=True)

    async def completions(self, request: Request) -> Response:
        """Handle POST /v1/completions."""
        return await self._answer(request, await self._read_completion(request), chat=False)

    # The request body, with its images, is in memory only until these return.

    async def _read_chat(self, request: Request) -> _ParsedRequest:
        served = self.worker.require()
        async with self.bodies.read(request) as fields:
            self._check_model(fields)
            asked = read_chat(fields, self._bounds(served))
            prompt = await run_until_disconnect(
                request.receive, self.prompt_builder.question(served, asked.system, asked.messages)
            )
        return _ParsedRequest([] if prompt is None else [prompt], asked.options)

    async def _read_completion(self, request: Request) -> _ParsedRequest:
        served = self.worker.require()
        async with self.bodies.read(request) as fields:
            self._check_model(fields)
            asked = read_completion(fields, self._bounds(served))
            prompts = await run_until_disconnect(request.receive, self.prompt_builder.texts(served, asked.prompts))
        return _ParsedRequest(prompts or [], asked.options, echo=asked.echo)

    async def _answer(self, request: Request, read: _ParsedRequest, *, chat: bool) -> Response:
        if not read.prompts:
            return Response()  # the client has disconnected
        options = read.options
        generation = Generation(
            self.worker,
            read.prompts,
            options,
            metrics=self.metrics,
            param="messages" if chat else "prompt",
            continues_text=not chat,
        )
        envelope = ResponseBuilder(
            self.config.model_name, chat, self.worker.require().encoder.tokenizer, options.sampling.logprobs is not None
        )
        echoes = [(one.text or "") if read.echo else "" for one in read.prompts for _ in range(options.choices)]
        if options.stream:
            return EventStreamResponse(_stream(generation, envelope, echoes, options), close=generation.close)
        try:
            body = await run_until_disconnect(request.receive, _collect(generation, envelope, echoes))
        finally:
            generation.close()
        return Response() if body is None else JsonResponse(body)

    async def models(self, request: Request) -> Response:
        """Handle GET /v1/models."""
        return JsonResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """Handle GET /v1/models/{id}."""
        self._check_name(request.path_params["model"])
        return JsonResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        """Handle POST /tokenize: `prompt`, or `messages` in the model's template (0 at image positions)."""
        served = self.worker.require()
        tokenizer = served.encoder.tokenizer
        async with self.bodies.read(request) as fields:
            self._check_model(fields)
            if fields.has("messages"):
                asked = await self.prompt_builder.question(
                    served, *read_messages(fields, max_images=self.config.max_images)
                )
                ids = asked.prompt.token_ids.tolist()
            else:
                text = fields.text(
                    "prompt", "", longest=served.engine.limits.max_positions * tokenizer.max_piece_length
                )
                ids = await self.prompt_builder.run(tokenizer.encode, text)
                if fields.boolean("add_special_tokens", True):
                    ids = [tokenizer.bos_id, *ids]
            wants_strings = fields.boolean("return_token_strs")
        strings = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids] if wants_strings else None
        return JsonResponse(
            {
                "count": len(ids),
                "max_model_len": served.engine.limits.max_positions,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """Handle POST /detokenize."""
        tokenizer = self.worker.require().encoder.tokenizer
        async with self.bodies.read(request) as fields:
            self._check_model(fields)
            ids = fields.items("tokens", longest=MAX_DETOKENIZED, kind=int)
            if not all(0 <= i < tokenizer.vocab_size for i in ids):
                raise ApiError(f"tokens must be from 0 to {tokenizer.vocab_size - 1}", param="tokens")
            text = await self.prompt_builder.run(lambda: tokenizer.decode(ids, skip_special=False))
        return JsonResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """Handle GET /tokenizer_info: the tokenizer and the prompt template."""
        encoder = self.worker.require().encoder
        tokenizer, template = encoder.tokenizer, encoder.template
        return JsonResponse(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": True,
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
                "sha256": tokenizer.fingerprint,
                "template": template.name,
                "system": template.system,
            }
        )

    async def version(self, request: Request) -> Response:
        """Handle GET /version."""
        return JsonResponse({"version": __version__})

    def _card(self) -> dict[str, Any]:
        served = self.worker.require()
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "megatron_share4v",
            "root": self.config.model_name,
            "parent": None,
            "max_model_len": served.engine.limits.max_positions,
            "max_images": self.config.max_images,
            "max_image_bytes": self.config.max_image_bytes,
            "tokens_per_image": served.tokens_per_image,
        }

    def _check_model(self, fields: JsonFields) -> None:
        self._check_name(fields.text("model", self.config.model_name))
        for name in fields.values:
            # Logged once each, up to MAX_NOTED: clients choose the names.
            if name not in KNOWN and name not in self.noted and len(self.noted) < MAX_NOTED:
                self.noted.add(name)
                get_logger().info("a request has the unknown field %r, which is ignored", name[:100])

    def _check_name(self, name: str) -> None:
        if name != self.config.model_name:
            raise ApiError(
                f"the model {name[:100]!r} does not exist; this server has {self.config.model_name!r}",
                status=404,
                param="model",
            )

    def _bounds(self, served: ServedModel) -> RequestLimits:
        tokenizer = served.encoder.tokenizer
        return RequestLimits(
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            max_images=self.config.max_images,
            max_choices=self.config.max_choices,
        )


async def _collect(generation: Generation, envelope: ResponseBuilder, echoes: list[str]) -> dict[str, Any]:
    texts, finishes = list(echoes), [""] * len(echoes)
    tokens: list[list[Token]] = [[] for _ in echoes]
    async for delta in generation.deltas():
        texts[delta.index] += delta.text
        tokens[delta.index] += (*delta.prompt, *delta.tokens)
        finishes[delta.index] = delta.finish_reason or ""
    choices = [envelope.choice(index, texts[index], finishes[index], tokens[index]) for index in range(len(echoes))]
    return envelope.whole(choices, usage(generation))


async def _stream(
    generation: Generation, envelope: ResponseBuilder, echoes: list[str], options: GenerationOptions
) -> AsyncGenerator[str, None]:
    offsets = [0] * len(echoes)
    try:
        for index in range(len(echoes) if envelope.chat else 0):
            yield event(envelope.chunk([envelope.opening(index)]))
        async for delta in generation.deltas():
            if echoes[delta.index]:
                delta = replace(delta, text=echoes[delta.index] + delta.text)
                echoes[delta.index] = ""
            for part in envelope.parts(delta, offset=offsets[delta.index]):
                yield event(envelope.chunk([part], usage(generation) if options.continuous_usage else None))
            offsets[delta.index] += len(delta.text)
        if options.include_usage:
            yield event(envelope.chunk([], usage(generation)))
    except ApiError as refusal:
        yield event(refusal.body())
    yield DONE

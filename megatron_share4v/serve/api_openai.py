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
from megatron_share4v.serve.http import RECORD, BodyReader, EventStreamResponse, JsonResponse, run_until_disconnect
from megatron_share4v.serve.json_fields import JsonFields
from megatron_share4v.serve.messages import read_conversation
from megatron_share4v.serve.metrics import Metrics
from megatron_share4v.serve.prompt_builder import BuiltPrompt, PromptBuilder
from megatron_share4v.serve.protocol import (
    GenerationOptions,
    RequestLimits,
    read_chat,
    read_completion,
)
from megatron_share4v.serve.request_fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, RouteFields, check_fields
from megatron_share4v.serve.responses import DONE, ResponseBuilder, event, usage
from megatron_share4v.text.tokenizer_config import LEGACY_RULE

MAX_DETOKENIZED = 1 << 20
MAX_LOGGED_FIELDS = 256


@dataclass
class OpenAIRoutes:
    """Handlers of OpenAI's and vLLM's routes. logged_fields: unknown fields that have been logged."""

    config: ServeConfig
    worker: EngineThread
    bodies: BodyReader
    prompt_builder: PromptBuilder
    metrics: Metrics
    started: int
    logged_fields: set[str] = field(default_factory=set)

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
        prompts, options = await self._read_chat(request)
        return await self._answer(request, prompts, options, chat=True)

    async def completions(self, request: Request) -> Response:
        """Handle POST /v1/completions."""
        prompts, options = await self._read_completion(request)
        return await self._answer(request, prompts, options, chat=False)

    # The request body, with its images, is in memory only until these return: without prompts when the client has
    # disconnected.

    async def _read_chat(self, request: Request) -> tuple[list[BuiltPrompt], GenerationOptions]:
        served = self.worker.require()
        async with self.bodies.read(request) as fields:
            self._check_fields(fields, CHAT)
            parsed = read_chat(fields, self._limits(served))
            prompt = await run_until_disconnect(
                request.receive, self.prompt_builder.question(served, parsed.conversation)
            )
        return [] if prompt is None else [prompt], parsed.options

    async def _read_completion(self, request: Request) -> tuple[list[BuiltPrompt], GenerationOptions]:
        served = self.worker.require()
        async with self.bodies.read(request) as fields:
            self._check_fields(fields, COMPLETION)
            parsed = read_completion(fields, self._limits(served))
            prompts = await run_until_disconnect(request.receive, self.prompt_builder.texts(served, parsed))
        return prompts or [], parsed.options

    async def _answer(
        self, request: Request, prompts: list[BuiltPrompt], options: GenerationOptions, *, chat: bool
    ) -> Response:
        if not prompts:
            return Response()  # the client has disconnected
        generation = Generation(
            self.worker,
            prompts,
            options,
            metrics=self.metrics,
            param="messages" if chat else "prompt",
            continues_text=not chat,
        )
        record = request.scope[RECORD]
        record.generation = generation
        builder = ResponseBuilder(
            self.config.model_name,
            chat,
            self.worker.require().encoder.tokenizer,
            options.sampling.logprobs is not None,
            record.id,
        )
        echoes = [one.echo for one in prompts for _ in range(options.choices)]
        if options.stream:
            return EventStreamResponse(_stream(generation, builder, echoes, options), close=generation.close)
        try:
            body = await run_until_disconnect(request.receive, _collect(generation, builder, echoes))
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
            self._check_fields(fields, TOKENIZE)
            if fields.has("messages"):
                built = await self.prompt_builder.question(
                    served, read_conversation(fields, max_images=self.config.max_images)
                )
                ids = built.prompt.token_ids.tolist()
            else:
                text = fields.text(
                    "prompt", "", longest=served.engine.limits.max_positions * tokenizer.max_piece_length
                )
                ids = await self.prompt_builder.run(tokenizer.encode, text)
                if fields.boolean("add_special_tokens", True):
                    ids = [*tokenizer.bos_ids, *ids]
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
            self._check_fields(fields, DETOKENIZE)
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
                "tokenizer_class": tokenizer.class_name,
                "legacy": None if tokenizer.rule is None else tokenizer.rule == LEGACY_RULE,
                "tokenizer_rule": tokenizer.rule,
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "stop_token_ids": sorted(encoder.stop_ids),
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

    def _check_fields(self, fields: JsonFields, route: RouteFields) -> None:
        self._check_name(fields.text("model", self.config.model_name))
        for name in check_fields(fields, route):
            # Logged once each, up to MAX_LOGGED_FIELDS: clients choose the names.
            if name not in self.logged_fields and len(self.logged_fields) < MAX_LOGGED_FIELDS:
                self.logged_fields.add(name)
                get_logger().info("a request has the unknown field %r, which is ignored", name[:100])

    def _check_name(self, name: str) -> None:
        if name != self.config.model_name:
            raise ApiError(
                f"the model {name[:100]!r} does not exist; this server has {self.config.model_name!r}",
                status=404,
                param="model",
            )

    def _limits(self, served: ServedModel) -> RequestLimits:
        tokenizer = served.encoder.tokenizer
        return RequestLimits(
            vocab_size=tokenizer.vocab_size,
            end_ids=served.encoder.stop_ids,
            max_images=self.config.max_images,
            max_choices=self.config.max_choices,
        )


async def _collect(generation: Generation, builder: ResponseBuilder, echoes: list[str]) -> dict[str, Any]:
    texts, finishes = list(echoes), [""] * len(echoes)
    tokens: list[list[Token]] = [[] for _ in echoes]
    async for delta in generation.deltas():
        texts[delta.index] += delta.text
        tokens[delta.index] += (*delta.prompt, *delta.tokens)
        finishes[delta.index] = delta.finish_reason or ""
    choices = []
    for index, text in enumerate(texts):
        # A stop string is cut from the text, but its tokens are listed.
        listed = [replace(token, offset=min(token.offset, len(text))) for token in tokens[index]]
        choices.append(builder.choice(index, text, finishes[index], listed))
    return builder.whole(choices, usage(generation))


async def _stream(
    generation: Generation, builder: ResponseBuilder, echoes: list[str], options: GenerationOptions
) -> AsyncGenerator[str, None]:
    try:
        for index in range(len(echoes) if builder.chat else 0):
            yield event(builder.chunk([builder.opening(index)]))
        async for delta in generation.deltas():
            if echoes[delta.index]:
                delta = replace(delta, text=echoes[delta.index] + delta.text)
                echoes[delta.index] = ""
            for part in builder.parts(delta):
                yield event(builder.chunk([part], usage(generation) if options.continuous_usage else None))
        if options.include_usage:
            yield event(builder.chunk([], usage(generation)))
    except ApiError as error:
        yield event(error.body())
    yield DONE

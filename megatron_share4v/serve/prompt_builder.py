"""From parsed requests to engine prompts: loads images, and tokenizes conversations on worker threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.data.loading.prompt import Prompt, make_chat_prompt, prompt_from_ids
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.serve.api_error import ApiError, context_length_error
from megatron_share4v.serve.engine_thread import ServedModel
from megatron_share4v.serve.images.fetch import ImageFetcher
from megatron_share4v.serve.images.loader import ImageLoader
from megatron_share4v.serve.messages import Conversation
from megatron_share4v.serve.protocol import CompletionRequest
from megatron_share4v.text.detokenizer import IncrementalDetokenizer
from megatron_share4v.text.mask import IMAGE_TOKEN_INDEX
from megatron_share4v.text.tokenizer import Tokenizer

T = TypeVar("T")
TEXT_THREADS = 2


@dataclass(frozen=True)
class BuiltPrompt:
    """One prompt. echo: its text where the response repeats it. offsets: position in it of each token's text."""

    prompt: Prompt
    echo: str = ""
    offsets: tuple[int, ...] = ()


class PromptBuilder:
    """Builds prompts; text never waits for images."""

    def __init__(self, config: ServeConfig, *, fetcher: ImageFetcher | None = None) -> None:
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="tokenize")
        self.images = ImageLoader(config, fetcher=fetcher)

    def close(self) -> None:
        """End the threads and the processes that decode images."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.images.close()

    async def question(self, served: ServedModel, conversation: Conversation) -> BuiltPrompt:
        """The prompt of a conversation. Raises ApiError."""
        messages = conversation.messages
        check_length(served, [conversation.system or "", *(message.text for message in messages)], param="messages")
        policy = served.encoder.images
        images = [
            None if m is None else await self.images.load(m.url, policy=policy, place=m.place)
            for m in (message.image for message in messages)
        ]
        return await self.run(_question, served, conversation, images)

    async def texts(self, served: ServedModel, request: CompletionRequest) -> list[BuiltPrompt]:
        """Prompts of texts, with a leading bos_id, and of ids, unchanged. Raises ApiError."""
        for prompt in request.prompts:
            check_length(served, [prompt], param="prompt")
        return [await self.run(_text, served, prompt, request) for prompt in request.prompts]

    async def with_images(
        self, served: ServedModel, pieces: Sequence[str], images: Sequence[str], *, place: str, add_bos: bool
    ) -> BuiltPrompt:
        """The prompt of texts with one image between consecutive texts. Raises ApiError."""
        check_length(served, pieces, param=place)
        policy = served.encoder.images
        own = place.replace("prompts", "images")
        pixels = [
            await self.images.load(image, policy=policy, place=f"{own}[{number}]")
            for number, image in enumerate(images)
        ]
        return await self.run(_pieces, served, pieces, pixels, place, add_bos)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Run a function on a worker thread; its DataError becomes an ApiError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except DataError as error:
            raise ApiError(str(error)) from error


def check_length(served: ServedModel, texts: Sequence[str | tuple[int, ...]], *, param: str) -> None:
    """Reject, before tokenizing, what exceeds the context for any tokenization. Raises ApiError."""
    characters, limit = sum(map(len, texts)), served.engine.limits.max_positions
    if characters > limit * served.encoder.tokenizer.max_piece_length:
        raise context_length_error(f"a prompt of {characters} characters has more", limit=limit, param=param)


def remaining_positions(served: ServedModel, prompt: Prompt, *, param: str) -> int:
    """Number of tokens left for an answer. Raises ApiError when there are none."""
    length, limit = prompt.token_ids.numel(), served.engine.limits.max_positions
    if length >= limit:
        raise context_length_error(
            f"the prompt has {length}, image positions included, which leaves none for an answer",
            limit=limit,
            param=param,
        )
    return limit - length


def _question(
    served: ServedModel,
    conversation: Conversation,
    images: Sequence[np.ndarray | None],
) -> BuiltPrompt:
    prompt = make_chat_prompt(
        served.encoder,
        [Turn(message.role, message.text) for message in conversation.messages],
        images=images,
        tokens_per_image=served.tokens_per_image,
        system=conversation.system,
        raw=conversation.raw,
    )
    return BuiltPrompt(prompt)


def _text(served: ServedModel, prompt: str | tuple[int, ...], request: CompletionRequest) -> BuiltPrompt:
    tokenizer = served.encoder.tokenizer
    if isinstance(prompt, str):
        own, spans = tokenizer.encode_with_offsets(prompt)
        bos = tokenizer.bos_ids * request.add_bos
        ids, text, offsets = [*bos, *own], prompt, [0] * len(bos) + [start for start, _ in spans]
    else:
        ids, text = list(prompt), tokenizer.decode(prompt)
        offsets = _offsets(tokenizer, prompt) if request.echo else []
    built = prompt_from_ids(served.encoder, ids, images=[], tokens_per_image=served.tokens_per_image, name="prompt")
    return BuiltPrompt(built, echo=text, offsets=tuple(offsets)) if request.echo else BuiltPrompt(built)


def _offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Position in the decoded text where the text of each token begins."""
    stream, offsets = IncrementalDetokenizer(tokenizer), []
    for token_id in ids:
        offsets.append(stream.decoded)
        stream.feed([token_id])
    return offsets


def _pieces(
    served: ServedModel,
    pieces: Sequence[str],
    images: Sequence[np.ndarray],
    place: str,
    add_bos: bool,
) -> BuiltPrompt:
    tokenizer = served.encoder.tokenizer
    ids = tokenizer.bos_ids * add_bos
    for number, piece in enumerate(pieces):
        ids += [IMAGE_TOKEN_INDEX] * (number > 0) + tokenizer.encode(piece)
    if not ids:
        raise ApiError(f"{place} is empty", param=place)
    return BuiltPrompt(
        prompt_from_ids(served.encoder, ids, images=images, tokens_per_image=served.tokens_per_image, name=place)
    )

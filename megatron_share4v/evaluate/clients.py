"""Clients that answer benchmark questions: a local model, or an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import islice

from megatron_share4v.data.images.pil_decoder import crop_centre_square, image_to_data_url
from megatron_share4v.data.loading.prompt import Prompt, make_prompt
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.records import Decoding, Doc
from megatron_share4v.infer.batch_generate import GenerationResult, GenerationTask, generate_stream
from megatron_share4v.infer.data_parallel import Replica
from megatron_share4v.infer.request import SamplingParams
from megatron_share4v.remote.openai_client import ChatClient, RequestRefused
from megatron_share4v.text.template import get_template


class LocalClient:
    """Client of a local model. Calls yield answers as they finish; questions are taken from the iterator on demand."""

    def __init__(self, replica: Replica, *, decoding: Decoding, workers: int) -> None:
        """Use the image mode of the benchmark instead of that of training, and its template for models of Vicuna."""
        self._replica, self._decoding, self._workers = replica, decoding, workers
        vision = replica.session.config.model.vision
        images = replace(replica.session.encoder.images, aspect_ratio=decoding.aspect_ratio)
        template = decoding.prompt_template(replica.session.encoder.template)
        self._encoder = replace(replica.session.encoder, template=template, images=images)
        self._tokens_per_image = vision.num_features

    def __call__(self, items: Iterator[Doc]) -> Iterator[list[GenerationResult]]:
        """Yield outcomes; an answer ends where the context is full.

        An outcome with an error is a question that cannot be encoded.
        """
        sampling = SamplingParams(max_new_tokens=self._decoding.max_new_tokens, temperature=0.0)
        works = (GenerationTask(item.id, partial(self._prompt, item), sampling) for item in items)
        return generate_stream(
            self._replica.engine, works, tokenizer=self._encoder.tokenizer, workers=self._workers, truncate=True
        )

    def _prompt(self, item: Doc) -> Prompt:
        turns = (Turn("human", item.turn),)
        return make_prompt(
            self._encoder,
            turns,
            image=item.read_image(),
            tokens_per_image=self._tokens_per_image,
            name=f"question {item.question_id}",
        )


class RemoteClient:
    """Client of an OpenAI-compatible server, which preprocesses images itself; benchmarks that crop send the centre
    square as PNG.
    """

    def __init__(self, chat: ChatClient, *, decoding: Decoding) -> None:
        self._chat, self._decoding = chat, decoding

    def __call__(self, items: Iterator[Doc]) -> Iterator[list[GenerationResult]]:
        """Yield outcomes from the server.

        An outcome with an error is a question whose picture cannot be read or whose request the server refuses. Raises
        ConfigError when the endpoint refuses key, model or path, and DataError when it does not respond.
        """
        pool, count = ThreadPoolExecutor(self._chat.endpoint.concurrency), self._chat.endpoint.concurrency
        going = {pool.submit(self._ask, item) for item in islice(items, count)}
        try:
            while going:
                finished, going = wait(going, return_when=FIRST_COMPLETED)
                going |= {pool.submit(self._ask, item) for item in islice(items, len(finished))}
                yield [future.result() for future in finished]
        finally:
            self._chat.stop()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, item: Doc) -> GenerationResult:
        try:
            messages = self._messages(item)
            reply = self._chat.ask(
                {"messages": messages, "max_tokens": self._decoding.max_new_tokens, "temperature": 0}
            )
        except (_BadPicture, RequestRefused) as error:
            return GenerationResult(item.id, error=str(error))
        return GenerationResult(item.id, text=reply.text, tokens=reply.tokens, finish_reason=reply.finish_reason)

    def _messages(self, item: Doc) -> list[dict[str, object]]:
        """Messages of a question. Raises _BadPicture when its picture cannot be read."""
        content: list[dict[str, object]] = [{"type": "text", "text": item.prompt}]
        try:
            if (image := item.read_image()) is not None:
                shown = crop_centre_square(image) if self._decoding.image_mode == "crop" else image
                content.insert(0, {"type": "image_url", "image_url": {"url": image_to_data_url(shown)}})
        except DataError as error:
            raise _BadPicture(str(error)) from error
        return [
            {"role": "system", "content": get_template(self._decoding.template).system},
            {"role": "user", "content": content},
        ]


class _BadPicture(Exception):
    """A picture that cannot be read or decoded."""

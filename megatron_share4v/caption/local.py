"""Captions from a model in this process: images are read and decoded ahead by threads, the engine answers as many at a time as it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_share4v.caption.records import Picture, Row, Settings
from megatron_share4v.data.prompt import Prompt, make_prompt
from megatron_share4v.data.sample import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.infer.beams import BeamEngine
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.request import Request, Sampling
from megatron_share4v.infer.session import Session
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

MOST_AT_ONCE = 64
"""Rows of bad images that are handed on together."""


class LocalCaptioner:
    """Calls yield rows as they are finished, in whatever order; pictures are taken from the iterator only as they are needed."""

    def __init__(self, session: Session, engine: Engine, *, settings: Settings, workers: int) -> None:
        self._session, self._settings, self._workers = session, settings, workers
        self._engine = engine if settings.num_beams == 1 else BeamEngine(engine, beams=settings.num_beams)
        self._turns = (Turn("human", f"{IMAGE_PLACEHOLDER}\n{settings.prompt}"),)

    def __call__(self, pictures: Iterator[Picture]) -> Iterator[list[Row]]:
        """Raises DataError when prompt and longest caption do not fit into the model: that is so for all images alike."""
        limit = self._engine.limits.max_requests
        going: dict[str, tuple[Picture, list[int]]] = {}
        with ThreadPoolExecutor(self._workers) as pool:
            prompts, more = self._prompts(pool, pictures, ahead=2 * limit), True
            while more or going:
                finished: list[Row] = []
                while more and len(going) < limit and len(finished) < MOST_AT_ONCE:
                    picture, prompt = next(prompts, (None, None))
                    more = picture is not None
                    if isinstance(prompt, DataError):
                        finished.append(Row(picture.id, picture.path, error=str(prompt)))
                    elif more:
                        self._engine.add(Request(picture.id, prompt, self._sampling(picture)))
                        going[picture.id] = picture, []
                finished += self._step(going)
                if finished:
                    yield finished

    def _step(self, going: dict[str, tuple[Picture, list[int]]]) -> Iterator[Row]:
        for event in self._engine.step() if going else ():
            picture, ids = going[event.request_id]
            if event.token_id is not None:
                ids.append(event.token_id)
            if event.finish is not None:
                del going[event.request_id]
                caption = self._session.encoder.tokenizer.decode(ids).strip()
                yield Row(picture.id, picture.path, caption=caption, tokens=len(ids), finish_reason=event.finish)

    def _prompts(self, pool: ThreadPoolExecutor, pictures: Iterator[Picture], *, ahead: int) -> Iterator[tuple[Picture, Prompt | DataError]]:
        """In order, `ahead` of them on their way."""
        waiting: deque[tuple[Picture, Future]] = deque()
        for picture in pictures:
            waiting.append((picture, pool.submit(self._prompt, picture)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    def _prompt(self, picture: Picture) -> Prompt | DataError:
        try:
            patches = self._session.config.model.vision.num_patches
            return make_prompt(self._session.encoder, self._turns, image=picture.read(), tokens_per_image=patches, name=picture.path)
        except DataError as error:
            return error

    def _sampling(self, picture: Picture) -> Sampling:
        given = self._settings
        return Sampling(
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            top_p=given.top_p,
            repetition_penalty=given.repetition_penalty,
            seed=given.seed_of(picture),
        )

"""Batch generation over a stream of tasks: threads prefetch prompts, the engine runs as many requests as it admits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_share4v.data.loading.prompt import Prompt
from megatron_share4v.errors import DataError
from megatron_share4v.infer.beam_search import BeamSearchEngine
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.request import GenerationRequest, SamplingParams
from megatron_share4v.text.tokenizer import Tokenizer

MOST_AT_ONCE = 64
"""Maximum number of failed prompts per yielded list."""


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """One prompt to answer. prompt: builds it on a worker thread; raises DataError when that is impossible."""

    id: str
    prompt: Callable[[], Prompt]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """An answer of `tokens` tokens, or an error. finish_reason: "stop" or "length"."""

    id: str
    text: str | None = None
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None


def generate_stream(
    engine: Engine | BeamSearchEngine,
    works: Iterator[GenerationTask],
    *,
    tokenizer: Tokenizer,
    workers: int,
    truncate: bool = False,
) -> Iterator[list[GenerationResult]]:
    """Yield results as they finish, in any order; tasks are consumed only as needed.

    truncate: an answer that exceeds the model's positions is truncated. Otherwise, and for a prompt that leaves no
    position for an answer, raises DataError.
    """
    limit = engine.limits.max_requests
    going: dict[str, list[int]] = {}
    with ThreadPoolExecutor(workers) as pool:
        prompts, more = _prefetch_prompts(pool, works, count=2 * limit), True
        try:
            while more or going:
                finished: list[GenerationResult] = []
                while more and len(going) < limit and len(finished) < MOST_AT_ONCE:
                    following = next(prompts, None)
                    if following is None:
                        more = False
                        break
                    work, prompt = following
                    if isinstance(prompt, DataError):
                        finished.append(GenerationResult(work.id, error=str(prompt)))
                    else:
                        engine.add(_make_request(work, prompt, engine.limits.max_positions if truncate else None))
                        going[work.id] = []
                finished += _step(engine, going, tokenizer)
                if finished:
                    yield finished
        except (DataError, GeneratorExit):
            # Cancel the remaining requests so that the engine can be used again.
            for name in going:
                engine.cancel(name)
            engine.step()
            raise


def _make_request(work: GenerationTask, prompt: Prompt, positions: int | None) -> GenerationRequest:
    """Engine request of a task. positions: limit of prompt and answer together."""
    find_longest_prefix = work.sampling.max_new_tokens
    if positions is not None:
        find_longest_prefix = max(1, min(find_longest_prefix, positions - prompt.token_ids.numel()))
    return GenerationRequest(work.id, prompt, replace(work.sampling, max_new_tokens=find_longest_prefix))


def _step(
    engine: Engine | BeamSearchEngine, going: dict[str, list[int]], tokenizer: Tokenizer
) -> Iterator[GenerationResult]:
    """Results of the requests that finish in one engine step."""
    for event in engine.step() if going else ():
        ids = going[event.request_id]
        if event.token_id is not None:
            ids.append(event.token_id)
        if event.finish_reason is not None:
            del going[event.request_id]
            yield GenerationResult(
                event.request_id, text=tokenizer.decode(ids).strip(), tokens=len(ids), finish_reason=event.finish_reason
            )


def _prefetch_prompts(
    pool: ThreadPoolExecutor, works: Iterator[GenerationTask], *, count: int
) -> Iterator[tuple[GenerationTask, Prompt | DataError]]:
    """Yield tasks with their prompts in order, `count` of them being built ahead."""
    waiting: deque[tuple[GenerationTask, Future]] = deque()
    for work in works:
        waiting.append((work, pool.submit(_build_prompt, work)))
        if len(waiting) > count:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _build_prompt(work: GenerationTask) -> Prompt | DataError:
    """Build a task's prompt; returns the DataError when that fails."""
    try:
        return work.prompt()
    except DataError as error:
        return error

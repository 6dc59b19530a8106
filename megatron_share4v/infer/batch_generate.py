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

MAX_FAILED_PER_YIELD = 64
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
    tasks: Iterator[GenerationTask],
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
    running: dict[str, list[int]] = {}
    with ThreadPoolExecutor(workers) as pool:
        prompts, has_more = _prefetch_prompts(pool, tasks, count=2 * limit), True
        try:
            while has_more or running:
                finished: list[GenerationResult] = []
                while has_more and len(running) < limit and len(finished) < MAX_FAILED_PER_YIELD:
                    entry = next(prompts, None)
                    if entry is None:
                        has_more = False
                        break
                    task, prompt = entry
                    if isinstance(prompt, DataError):
                        finished.append(GenerationResult(task.id, error=str(prompt)))
                    else:
                        engine.add(_make_request(task, prompt, engine.limits.max_positions if truncate else None))
                        running[task.id] = []
                finished += _step(engine, running, tokenizer)
                if finished:
                    yield finished
        except (DataError, GeneratorExit):
            # Cancel the remaining requests so that the engine can be used again.
            for name in running:
                engine.cancel(name)
            engine.step()
            raise


def _make_request(task: GenerationTask, prompt: Prompt, positions: int | None) -> GenerationRequest:
    """Engine request of a task. positions: limit of prompt and answer together."""
    max_new_tokens = task.sampling.max_new_tokens
    if positions is not None:
        max_new_tokens = max(1, min(max_new_tokens, positions - prompt.token_ids.numel()))
    return GenerationRequest(task.id, prompt, replace(task.sampling, max_new_tokens=max_new_tokens))


def _step(
    engine: Engine | BeamSearchEngine, running: dict[str, list[int]], tokenizer: Tokenizer
) -> Iterator[GenerationResult]:
    """Results of the requests that finish in one engine step."""
    for event in engine.step() if running else ():
        ids = running[event.request_id]
        if event.token_id is not None:
            ids.append(event.token_id)
        if event.finish_reason is not None:
            del running[event.request_id]
            yield GenerationResult(
                event.request_id, text=tokenizer.decode(ids).strip(), tokens=len(ids), finish_reason=event.finish_reason
            )


def _prefetch_prompts(
    pool: ThreadPoolExecutor, tasks: Iterator[GenerationTask], *, count: int
) -> Iterator[tuple[GenerationTask, Prompt | DataError]]:
    """Yield tasks with their prompts in order, `count` of them being built ahead."""
    waiting: deque[tuple[GenerationTask, Future]] = deque()
    for task in tasks:
        waiting.append((task, pool.submit(_build_prompt, task)))
        if len(waiting) > count:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _build_prompt(task: GenerationTask) -> Prompt | DataError:
    """Build a task's prompt; returns the DataError when that fails."""
    try:
        return task.prompt()
    except DataError as error:
        return error

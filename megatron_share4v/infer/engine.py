"""Continuous-batching engine: requests of ids and pixels in, token events out, one forward pass per step.

Runs on TP rank 0; the others follow (tp_executor.py). A request's answer does not depend on the other requests in the
batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.infer.model_runner import ModelRunner
from megatron_share4v.infer.request import GenerationRequest, TokenEvent, TokenLogprobs
from megatron_share4v.infer.sampler import compute_logprobs, sample_tokens
from megatron_share4v.infer.scheduler import EngineCounters, ScheduledChunk, Scheduler
from megatron_share4v.infer.sequence import Sequence
from megatron_share4v.infer.session import Session
from megatron_share4v.infer.tp_executor import TPExecutor
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.kv_cache import KVCache
from megatron_share4v.model.share4v import Share4V

CACHE_MEMORY_FRACTION = 0.5
"""Fraction of free memory used for the KV cache when no size is configured."""


@dataclass(kw_only=True)
class EngineStats(EngineCounters):
    """Current queue sizes and KV cache usage (fraction of rows held by running requests), with the counters."""

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Limits of the engine.

    max_positions: of one request, prompt and answer. cache_positions: of all running requests.
    """

    max_requests: int
    max_positions: int
    cache_positions: int


class Engine:
    """Scheduler, executor and sampler of one model replica. Not thread-safe.

    Constructed on every TP rank; rank 0 uses it and the others pass its executor to run_follower. Only ids below
    `vocabulary` are generated: the model's padded vocabulary may be larger than the tokenizer's.
    """

    def __init__(self, model: Share4V, *, config: EngineConfig, vocabulary: int, stop_ids: frozenset[int]) -> None:
        language = model.model.language
        positions = config.max_positions or language.max_position_embeddings
        if positions > language.max_position_embeddings:
            raise ConfigError(
                f"max_positions {positions} is more than the model's {language.max_position_embeddings}, beyond "
                "which it was never trained"
            )
        rows = config.cache_positions or _default_cache_positions(model, config.max_requests * positions)
        self.vocabulary, self.stop_ids = vocabulary, stop_ids
        self.limits = EngineLimits(
            max_requests=config.max_requests, max_positions=min(positions, rows), cache_positions=rows
        )
        self.executor = TPExecutor(ModelRunner(model, rows=rows))
        image_bytes = model.model.vision.num_features * language.hidden_size * model.config.params_dtype.itemsize
        self._scheduler = Scheduler(config, rows=rows, image_bytes=image_bytes)
        self._cancelled: deque[str] = deque()
        get_logger().info("engine: %s", self.limits)

    @classmethod
    def open(cls, session: Session, config: EngineConfig) -> Engine:
        """Engine for the session's model and tokenizer. Raises ConfigError when its mesh has pipeline stages."""
        if session.mesh.layout.num_stages > 1:
            raise ConfigError(
                f"generation supports tensor and data parallelism only, got {session.mesh.layout}; the weights of "
                "any layout load at pipeline 1"
            )
        encoder = session.encoder
        [model] = session.chunks
        assert isinstance(model, Share4V)
        return cls(model, config=config, vocabulary=encoder.tokenizer.vocab_size, stop_ids=encoder.stop_ids)

    def add(self, request: GenerationRequest) -> None:
        """Append to the waiting queue. Raises DataError for an empty prompt, invalid ids, or too many positions."""
        self._validate(request)
        self._scheduler.add(Sequence(request, end_ids=self.stop_ids))

    def cancel(self, request_id: str) -> None:
        """Cancel a request; the next step emits its last event. No effect on a finished request."""
        self._cancelled.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._cancelled or self._scheduler.waiting or self._scheduler.running)

    @property
    def stats(self) -> EngineStats:
        """Current statistics."""
        scheduler = self._scheduler
        usage = scheduler.kv_allocator.used / self.limits.cache_positions
        return EngineStats(
            running=len(scheduler.running), waiting=len(scheduler.waiting), cache_usage=usage, **vars(scheduler.counts)
        )

    def step(self) -> list[TokenEvent]:
        """Run one forward pass; returns its events, an empty list without work."""
        events = self._drop_cancelled()
        step = self._scheduler.schedule()
        if step is None:
            return events
        plan, chunks = step
        logits = self.executor.run(plan)[:, : self.vocabulary]
        self._scheduler.counts.steps += 1
        return events + self._process_logits(chunks, logits)

    def close(self) -> None:
        """Release the other TP ranks."""
        self.executor.close()

    def _validate(self, request: GenerationRequest) -> None:
        prompt, sampling = request.prompt, request.sampling
        length, ids = prompt.token_ids.numel(), prompt.token_ids
        if not length:
            raise DataError("the prompt is empty; give it at least one token")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise DataError(
                f"the prompt has ids from {int(ids.min())} to {int(ids.max())}; the tokenizer has 0 to "
                f"{self.vocabulary - 1}"
            )
        total, limit = length + sampling.max_new_tokens, self.limits.max_positions
        if total > limit:
            raise DataError(
                f"the prompt's {length} positions and {sampling.max_new_tokens} new tokens are {total} positions; "
                f"{limit} are possible: ask for fewer tokens or shorten the conversation"
            )

    def _drop_cancelled(self) -> list[TokenEvent]:
        events = []
        while self._cancelled:
            sequence = self._scheduler.remove(self._cancelled.popleft())
            if sequence is not None:
                events.append(TokenEvent(request_id=sequence.id, token_id=None, finish_reason="cancelled"))
        return events

    def _process_logits(self, chunks: Items[ScheduledChunk], logits: torch.Tensor) -> list[TokenEvent]:
        at, rows, due = 0, [], []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.in_prefill and sequence.sampling.prompt_logprobs:
                self._record_prompt_logprobs(chunk, logits[at : at + chunk.count])
                at += chunk.count - chunk.samples_token
            samples_token = chunk.samples_token
            self._scheduler.mark_computed(chunk)
            if samples_token:
                rows.append(at)
                due.append(sequence)
                at += 1
        if not due:
            return []
        picked = logits[torch.tensor(rows, device=logits.device)]
        tokens = sample_tokens(picked, [sequence.sampling_row() for sequence in due])
        return [
            self._make_event(sequence, token, picked[number])
            for number, (sequence, token) in enumerate(zip(due, tokens))
        ]

    def _record_prompt_logprobs(self, chunk: ScheduledChunk, logits: torch.Tensor) -> None:
        """Record log-probabilities of the prompt's own tokens; None at image slots."""
        sequence = chunk.sequence
        following = sequence.tokens[sequence.num_computed + 1 : sequence.num_computed + 1 + chunk.count]
        slots = set(sequence.request.prompt.image_slots.tolist())
        found = compute_logprobs(logits[: len(following)], following, alternatives=sequence.sampling.logprobs or 0)
        first = sequence.num_computed + 1
        sequence.prompt_logprobs += [None if first + number in slots else entry for number, entry in enumerate(found)]

    def _make_event(self, sequence: Sequence, token: int, logits: torch.Tensor) -> TokenEvent:
        prompt_logprobs = None
        if sequence.sampling.prompt_logprobs and len(sequence.tokens) == sequence.prompt_length:
            prompt_logprobs = tuple(sequence.prompt_logprobs)
        finish = sequence.append_token(token) if sequence.sampling.max_new_tokens else "length"
        emits_token = sequence.sampling.max_new_tokens > 0 and finish != "stop"
        logprobs: TokenLogprobs | None = None
        if emits_token and sequence.sampling.logprobs is not None:
            [logprobs] = compute_logprobs(logits.unsqueeze(0), [token], alternatives=sequence.sampling.logprobs)
        self._scheduler.counts.generation_tokens += emits_token
        if finish is not None:
            self._scheduler.remove(sequence.id)
        return TokenEvent(sequence.id, token if emits_token else None, logprobs, finish, prompt_logprobs)


def _default_cache_positions(model: Share4V, limit: int) -> int:
    """Cache rows that fit in memory, at most `limit`; equal on all TP ranks."""
    mesh, row_bytes = model.mesh, KVCache.bytes_per_row(model.config)
    if mesh.device.kind == "cuda":
        free = torch.cuda.mem_get_info(mesh.device.index)[0]
    else:
        free = psutil.virtual_memory().available // mesh.layout.tensor
    fitting = torch.tensor(int(free * CACHE_MEMORY_FRACTION) // row_bytes, device=mesh.device.torch_device)
    dist.all_reduce(fitting, op=dist.ReduceOp.MIN, group=mesh.tp_group)
    return min(limit, int(fitting))

"""Beam search and beam sampling over the engine's executor and KV cache.

The algorithm is transformers' (length penalty 1, early stopping off): of the 2n most likely continuations of n beams,
or 2n drawn without replacement, finished ones are kept with their mean log-probability and the best n others continue.
It ends when none of these can beat the worst of n finished ones. Drawing 2n without replacement is taking the top 2n
after Gumbel noise (Kool et al. 2019, arXiv 1903.06059). V ids of the tokenizer.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field

import torch

from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.kv_allocator import KVAllocator, KVRange
from megatron_share4v.infer.prefix_hash import image_digest
from megatron_share4v.infer.request import GenerationRequest, TokenEvent
from megatron_share4v.infer.sampler import GREEDY_TEMPERATURE
from megatron_share4v.infer.step_plan import CacheCopy, ImageSpan, StepPlan
from megatron_share4v.mcore.kv_cache import SequenceSpan


@dataclass(frozen=True)
class _Beam:
    """One beam: its generated ids, their summed log-probability, and the first KV row."""

    ids: tuple[int, ...]
    score: float
    start: int


@dataclass
class _Search:
    """State of one request.

    kv_range: its KV rows. row_starts: first row of each of its n beams. finished: (mean, ids, reason) of the best n
    finished beams, best first.
    """

    request: GenerationRequest
    kv_range: KVRange
    row_starts: list[int]
    beams: list[_Beam] = field(default_factory=list)
    finished: list[tuple[float, tuple[int, ...], str]] = field(default_factory=list)
    copies: list[CacheCopy] = field(default_factory=list)


class BeamSearchEngine:
    """Engine interface for beam search; all events of a request come when it finishes.

    Lives on TP rank 0; `engine` itself must stay idle. A beam counts as one of the engine's max_requests. Temperature 0
    searches, above it samples. The repetition penalty counts generated ids only, and the first token is never the end
    token, as in the published captioner. top_p, min_p, top_k, other penalties and logprobs are rejected.
    """

    def __init__(self, engine: Engine, *, beams: int) -> None:
        self.limits, self._engine, self._num_beams = engine.limits, engine, beams
        self._waiting: deque[GenerationRequest] = deque()
        self._running: list[_Search] = []
        self._kv_allocator = KVAllocator(engine.limits.cache_positions)
        self._encoded: tuple[bytes, ...] = ()

    def add(self, request: GenerationRequest) -> None:
        """Append to the waiting queue.

        Raises ConfigError for unsupported sampling parameters, DataError when n beams of prompt and answer exceed the
        cache.
        """
        given = request.sampling
        unsupported = (given.top_k, given.min_p, given.presence_penalty, given.frequency_penalty)
        if given.top_p != 1.0 or any(unsupported) or given.logprobs is not None:
            raise ConfigError(
                "beam search supports temperature and repetition_penalty only; leave out top_p and the others, "
                "or use one beam"
            )
        size, limits = self._size(request), self.limits
        if size > limits.max_positions or size * self._num_beams > limits.cache_positions:
            raise DataError(
                f"the prompt and {given.max_new_tokens} new tokens are {size} positions, and "
                f"{size * self._num_beams} in {self._num_beams} beams; "
                f"the limits are {limits.max_positions} and {limits.cache_positions}: ask for "
                "fewer tokens or beams"
            )
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Cancel a request, without an event."""
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        for search in [search for search in self._running if search.request.id == request_id]:
            self._running.remove(search)
            self._kv_allocator.free(search.kv_range)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

    def step(self) -> list[TokenEvent]:
        """Run one forward pass of all beams."""
        while self._waiting and len(self._running) < max(1, self.limits.max_requests // self._num_beams):
            size = self._size(self._waiting[0])
            allocation = self._kv_allocator.allocate(size * self._num_beams, ())
            if allocation is None:
                break
            row_starts = [allocation.kv_range.start + size * number for number in range(self._num_beams)]
            self._running.append(_Search(self._waiting.popleft(), allocation.kv_range, row_starts))
        if not self._running:
            return []
        logits = (
            self._engine.executor.run(self._plan_step())[:, : self._engine.vocabulary].float().log_softmax(dim=-1).cpu()
        )
        events, at = [], 0
        for search in list(self._running):
            rows = max(1, len(search.beams))
            if self._extend_beams(search, logits[at : at + rows]):
                events += _events(search)
                self._running.remove(search)
                self._kv_allocator.free(search.kv_range)
            at += rows
        return events

    @staticmethod
    def _size(request: GenerationRequest) -> int:
        return request.prompt.token_ids.numel() + request.sampling.max_new_tokens

    def _plan_step(self) -> StepPlan:
        ids: list[int] = []
        spans: list[SequenceSpan] = []
        copies: list[CacheCopy] = []
        encode: dict[bytes, torch.Tensor] = {}
        image_spans: list[ImageSpan] = []
        logits_positions: list[int] = []
        for search in self._running:
            prompt = search.request.prompt
            length = prompt.token_ids.numel()
            copies += search.copies
            for beam in search.beams:
                spans.append(SequenceSpan(start=beam.start, count=1, end=length + len(beam.ids)))
                ids.append(beam.ids[-1])
                logits_positions.append(len(ids) - 1)
            if not search.beams:
                digests = [image_digest(image) for image in prompt.pixels]
                encode |= dict(zip(digests, prompt.pixels))
                for digest, slots in zip(digests, prompt.image_slots.chunk(max(1, len(digests)))):
                    image_spans.append(
                        ImageSpan(digest=digest, slots=slots + len(ids), rows=torch.arange(slots.numel()))
                    )
                spans.append(SequenceSpan(start=search.row_starts[0], count=length, end=length))
                ids += prompt.token_ids.tolist()
                logits_positions.append(len(ids) - 1)
        # Image features are only read in the step that encodes them.
        evict, self._encoded = self._encoded, tuple(encode)
        return StepPlan(
            copies=tuple(copies),
            evict=evict,
            encode=tuple(encode.items()),
            token_ids=torch.tensor(ids),
            spans=tuple(spans),
            image_spans=tuple(image_spans),
            logits_positions=torch.tensor(logits_positions),
        )

    def _extend_beams(self, search: _Search, logits: torch.Tensor) -> bool:
        """Extend the beams by one token from log-probabilities [beams, V]; True when the search has ended."""
        given, ends, count = search.request.sampling, self._engine.stop_ids, self._num_beams
        beams = search.beams or [_Beam((), 0.0, search.row_starts[0])]
        scores, length = self._scores(search, beams, logits), len(beams[0].ids) + 1
        order = scores.flatten()
        if given.temperature > GREEDY_TEMPERATURE:
            order = order + _gumbel_noise(given.seed or 0, length, order.numel())
        top = order.topk(min(2 * count, order.numel())).indices
        chosen = top[scores.flatten()[top].argsort(descending=True, stable=True)].tolist()
        continued: list[tuple[int, int, float]] = []
        for rank, flat_index in enumerate(chosen):
            parent, token = divmod(flat_index, scores.size(1))
            score = float(scores[parent, token])
            if rank < count and (token in ends or length == given.max_new_tokens):
                ids = beams[parent].ids if token in ends else (*beams[parent].ids, token)
                search.finished.append((score / length, ids, "stop" if token in ends else "length"))
            elif token not in ends and len(continued) < count:
                continued.append((parent, token, score))
        search.finished = sorted(search.finished, key=lambda one: one[0], reverse=True)[:count]
        if length == given.max_new_tokens or not continued:
            return True
        self._assign_rows(search, beams, continued)
        return len(search.finished) == count and search.beams[0].score / length <= search.finished[-1][0]

    def _scores(self, search: _Search, beams: list[_Beam], values: torch.Tensor) -> torch.Tensor:
        given = search.request.sampling
        values = values.clone()
        for row, beam in zip(values, beams):
            if given.repetition_penalty != 1.0 and beam.ids:
                row[list(set(beam.ids))] *= given.repetition_penalty  # log-probabilities are all negative
        if not beams[0].ids:
            values[:, sorted(self._engine.stop_ids)] = float("-inf")
        if given.temperature > GREEDY_TEMPERATURE:
            values = values / given.temperature
        return values + torch.tensor([beam.score for beam in beams]).unsqueeze(1)

    def _assign_rows(self, search: _Search, beams: list[_Beam], continued: list[tuple[int, int, float]]) -> None:
        """Give each continuation KV rows: the first one of a beam keeps its rows, others get a copy in unused rows."""
        length = search.request.prompt.token_ids.numel()
        kept = {beams[parent].start for parent, _, _ in continued}
        spare, taken = [start for start in search.row_starts if start not in kept], set()
        search.copies, search.beams = [], []
        for parent, token, score in continued:
            beam, start = beams[parent], beams[parent].start
            if start in taken:
                start = spare.pop()
                search.copies.append(CacheCopy(beam.start, start, length + len(beam.ids)))
            taken.add(start)
            search.beams.append(_Beam((*beam.ids, token), score, start))


def _events(search: _Search) -> list[TokenEvent]:
    name, (_, ids, reason) = search.request.id, search.finished[0]
    events = [TokenEvent(name, token) for token in ids]
    if reason == "stop":
        return [*events, TokenEvent(name, None, finish_reason="stop")]
    return [*events[:-1], TokenEvent(name, ids[-1], finish_reason="length")]


def _gumbel_noise(seed: int, number: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise [size] for the `number`-th step of a request."""
    digest = hashlib.sha256(f"beams:{seed}:{number}".encode()).digest()
    uniform = torch.rand(
        size, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1), dtype=torch.float64
    )
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()

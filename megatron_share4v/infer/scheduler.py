"""Continuous batching: admit waiting requests, and choose which positions the next step computes.

Waiting requests are admitted when the KV cache has rows for them. Running sequences in decode get one position each;
the rest of the step budget goes to prefill chunks in arrival order. Independent of the model.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

import torch

from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.infer.kv_allocator import KVAllocator
from megatron_share4v.infer.prefix_hash import BLOCK_SIZE
from megatron_share4v.infer.sequence import Sequence
from megatron_share4v.infer.step_plan import CacheCopy, ImageSpan, StepPlan
from megatron_share4v.mcore.kv_cache import SequenceSpan


@dataclass
class EngineCounters:
    """Counters since start. Prefix queries and hits are in positions, image queries and hits in images."""

    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    encoder_calls: int = 0
    image_cache_queries: int = 0
    image_cache_hits: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass(frozen=True)
class ScheduledChunk:
    """The next `count` positions of a sequence."""

    sequence: Sequence
    count: int

    @property
    def samples_token(self) -> bool:
        """Whether a token is sampled after this chunk."""
        return self.sequence.num_computed + self.count == len(self.sequence.tokens)


class Scheduler:
    """Waiting and running queues over a KV cache of `rows` rows; image features take `image_bytes` per image."""

    def __init__(self, config: EngineConfig, *, rows: int, image_bytes: int) -> None:
        self.config, self.kv_allocator, self.counts = config, KVAllocator(rows), EngineCounters()
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self._image_bytes = image_bytes
        self._images: OrderedDict[bytes, None] = OrderedDict()  # digests in the feature cache, LRU first

    def add(self, sequence: Sequence) -> None:
        """Append to the waiting queue."""
        assert sequence.id not in self.waiting and sequence.id not in self.running, (
            f"request {sequence.id!r} is already queued"
        )
        self.waiting[sequence.id] = sequence

    def remove(self, request_id: str) -> Sequence | None:
        """Remove a finished or cancelled request; returns None when it is not queued."""
        if request_id in self.waiting:
            return self.waiting.pop(request_id)
        sequence = self.running.pop(request_id, None)
        if sequence is not None:
            self.kv_allocator.free(sequence.kv_range)
        return sequence

    def schedule(self) -> tuple[StepPlan, list[ScheduledChunk]] | None:
        """The next step's plan and its chunks in plan order; None when there is no work."""
        copies = self._admit_waiting()
        chunks = self._schedule_chunks()
        if not chunks:
            assert not self.waiting or self.running, "requests are waiting but none is running"
            return None
        image_spans: list[ImageSpan] = []
        spans: list[SequenceSpan] = []
        encode: dict[bytes, torch.Tensor] = {}
        at = 0
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.sequence.num_computed + chunk.count
            seen = sequence.image_spans(sequence.num_computed, end, at=at)
            encode |= self._images_to_encode(sequence, {span.digest for span in seen})
            image_spans += seen
            spans.append(SequenceSpan(start=sequence.kv_range.start, count=chunk.count, end=end))
            at += chunk.count
        plan = StepPlan(
            copies=tuple(copies),
            evict=tuple(self._evict_images(image_spans)),
            encode=tuple(encode.items()),
            token_ids=torch.tensor(
                [
                    t
                    for c in chunks
                    for t in c.sequence.tokens[c.sequence.num_computed : c.sequence.num_computed + c.count]
                ]
            ),
            spans=tuple(spans),
            image_spans=tuple(image_spans),
            logits_positions=_logits_positions(chunks),
        )
        return plan, chunks

    def mark_computed(self, chunk: ScheduledChunk) -> None:
        """Record that `chunk` has been computed, and add its full blocks to the prefix cache."""
        sequence = chunk.sequence
        self.counts.computed_prompt_tokens += max(
            0, min(sequence.num_computed + chunk.count, sequence.prompt_length) - sequence.num_computed
        )
        sequence.num_computed += chunk.count
        if self.config.prefix_cache:
            self.kv_allocator.cache_blocks(sequence.kv_range, sequence.new_block_keys())

    def _admit_waiting(self) -> list[CacheCopy]:
        """Move waiting requests to the running queue while rows are free; returns the prefix copies they need."""
        copies = []
        for sequence in list(islice(self.waiting.values(), 2 * self.config.max_requests)):
            if len(self.running) >= self.config.max_requests:
                break
            keys = self._reusable_keys(sequence)
            if self._blocks_being_computed(keys) > self.kv_allocator.find_longest_prefix(keys):
                continue  # another request is computing this prefix: wait and copy it
            allocation = self.kv_allocator.allocate(sequence.positions, keys)
            if allocation is None:
                break
            sequence.kv_range, sequence.num_computed = allocation.kv_range, allocation.reused
            if allocation.reused:
                copies.append(CacheCopy(allocation.source, allocation.kv_range.start, allocation.reused))
                self.kv_allocator.cache_blocks(allocation.kv_range, keys[: allocation.reused // BLOCK_SIZE])
            self.running[sequence.id] = self.waiting.pop(sequence.id)
            self.counts.prompt_tokens += sequence.prompt_length
            self.counts.prefix_cache_queries += sequence.prompt_length
            self.counts.prefix_cache_hits += allocation.reused
        return copies

    def _reusable_keys(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Keys of the prompt blocks that may come from the prefix cache.

        Excludes the last position, whose logits are needed, and everything when prompt logprobs are requested.
        """
        if not self.config.prefix_cache or sequence.sampling.prompt_logprobs:
            return ()
        return sequence.prompt_keys[: (sequence.prompt_length - 1) // BLOCK_SIZE]

    def _blocks_being_computed(self, keys: tuple[bytes, ...]) -> int:
        """Number of leading blocks that a running prefill will compute."""
        most = 0
        for other in self.running.values():
            if other.in_prefill:
                shared = 0
                for key, other_key in zip(keys, other.prompt_keys):
                    if key != other_key:
                        break
                    shared += 1
                most = max(most, shared)
        return most

    def _schedule_chunks(self) -> list[ScheduledChunk]:
        """Decode positions first, then prefill chunks up to the step's budget."""
        left = self.config.step_positions
        chunks = [ScheduledChunk(sequence, 1) for sequence in self.running.values() if not sequence.in_prefill]
        left -= len(chunks)
        for sequence in self.running.values():
            if sequence.in_prefill and left > 0:
                chunks.append(ScheduledChunk(sequence, min(left, sequence.prompt_length - sequence.num_computed)))
                left -= chunks[-1].count
        return chunks

    def _images_to_encode(self, sequence: Sequence, digests: set[bytes]) -> dict[bytes, torch.Tensor]:
        """Images of this chunk that are not in the feature cache. Each image counts as one query per request."""
        encode = {}
        for digest in digests:
            if digest not in sequence.looked_up_images:
                sequence.looked_up_images.add(digest)
                self.counts.image_cache_queries += 1
                self.counts.image_cache_hits += digest in self._images
            if digest not in self._images:
                self.counts.encoder_calls += 1
                encode[digest] = sequence.pixels_of(digest)
                self._images[digest] = None
            self._images.move_to_end(digest)
        return encode

    def _evict_images(self, image_spans: list[ImageSpan]) -> list[bytes]:
        """Evict least recently used image features over the cache limit. Runs before new images are encoded."""
        needed = {span.digest for span in image_spans}.union(
            *(sequence.pending_digests() for sequence in self.running.values())
        )
        evict = []
        for digest in list(self._images):
            if len(self._images) * self._image_bytes <= self.config.image_cache_bytes:
                break
            if digest not in needed:
                del self._images[digest]
                evict.append(digest)
        return evict


def _logits_positions(chunks: list[ScheduledChunk]) -> torch.Tensor:
    """Positions [R] that need logits: the last one of a sequence, or all of a prompt with prompt logprobs."""
    logits_positions: list[int] = []
    at = 0
    for chunk in chunks:
        if chunk.sequence.in_prefill and chunk.sequence.sampling.prompt_logprobs:
            logits_positions += range(at, at + chunk.count)
        elif chunk.samples_token:
            logits_positions.append(at + chunk.count - 1)
        at += chunk.count
    return torch.tensor(logits_positions, dtype=torch.int64)

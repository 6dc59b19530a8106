"""Who runs, and what the next step computes: waiting requests are let in when there is room, running ones get a token each, and what is left of the
step goes to prompts, in the order of arrival. Knows no model."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

import torch

from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.infer.kv_allocator import Room
from megatron_share4v.infer.prefix_hash import BLOCK
from megatron_share4v.infer.sequence import Sequence
from megatron_share4v.infer.step_plan import Copy, Picture, StepPlan
from megatron_share4v.mcore.kv_cache import SequenceSpan


@dataclass
class Counts:
    """Since the start. Prefix queries and hits in positions, image queries and hits in images."""

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
class Chunk:
    """`count` next positions of a sequence."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the sequence gets a token after it."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


class Scheduler:
    """`rows` of the key-value cache; an image's features take `image_bytes`."""

    def __init__(self, config: EngineConfig, *, rows: int, image_bytes: int) -> None:
        self.config, self.room, self.counts = config, Room(rows), Counts()
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self._image_bytes = image_bytes
        self._images: OrderedDict[bytes, None] = (
            OrderedDict()
        )  # whose features the runners hold, the least recently used first

    def add(self, sequence: Sequence) -> None:
        """It waits."""
        assert sequence.id not in self.waiting and sequence.id not in self.running, (
            f"request {sequence.id!r} is there already"
        )
        self.waiting[sequence.id] = sequence

    def remove(self, request_id: str) -> Sequence | None:
        """It has ended, or is to end; None when it is not there."""
        if request_id in self.waiting:
            return self.waiting.pop(request_id)
        sequence = self.running.pop(request_id, None)
        if sequence is not None:
            self.room.release(sequence.place)
        return sequence

    def next_step(self) -> tuple[StepPlan, list[Chunk]] | None:
        """The plan, and which chunks it computes, in its order. None: there is nothing to do."""
        copies = self._let_in()
        chunks = self._chunks()
        if not chunks:
            assert not self.waiting or self.running, "requests wait though nothing runs"
            return None
        pictures, spans, encode, at = [], [], {}, 0
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.sequence.computed + chunk.count
            seen = sequence.pictures(sequence.computed, end, at=at)
            encode |= self._to_encode(sequence, {picture.digest for picture in seen})
            pictures += seen
            spans.append(SequenceSpan(start=sequence.place.start, count=chunk.count, end=end))
            at += chunk.count
        plan = StepPlan(
            copies=tuple(copies),
            forget=tuple(self._to_forget(pictures)),
            encode=tuple(encode.items()),
            token_ids=torch.tensor(
                [t for c in chunks for t in c.sequence.tokens[c.sequence.computed : c.sequence.computed + c.count]]
            ),
            spans=tuple(spans),
            pictures=tuple(pictures),
            wanted=_wanted(chunks),
        )
        return plan, chunks

    def advance(self, chunk: Chunk) -> None:
        """It has been computed."""
        sequence = chunk.sequence
        self.counts.computed_prompt_tokens += max(
            0, min(sequence.computed + chunk.count, sequence.prompt_length) - sequence.computed
        )
        sequence.computed += chunk.count
        if self.config.prefix_cache:
            self.room.show(sequence.place, sequence.new_keys())

    def _let_in(self) -> list[Copy]:
        copies = []
        for sequence in list(islice(self.waiting.values(), 2 * self.config.max_requests)):
            if len(self.running) >= self.config.max_requests:
                break
            keys = self._reusable(sequence)
            if self._promised(keys) > self.room.longest(keys):
                continue  # another request is computing the same right now: what it has will be copied
            reservation = self.room.reserve(sequence.positions, keys)
            if reservation is None:
                break
            sequence.place, sequence.computed = reservation.place, reservation.reused
            if reservation.reused:
                copies.append(Copy(reservation.source, reservation.place.start, reservation.reused))
                self.room.show(reservation.place, keys[: reservation.reused // BLOCK])
            self.running[sequence.id] = self.waiting.pop(sequence.id)
            self.counts.prompt_tokens += sequence.prompt_length
            self.counts.prefix_cache_queries += sequence.prompt_length
            self.counts.prefix_cache_hits += reservation.reused
        return copies

    def _reusable(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Keys of the blocks that need not be computed: not the last position, whose logits are wanted, and none if all logits are."""
        if not self.config.prefix_cache or sequence.sampling.prompt_logprobs:
            return ()
        return sequence.prompt_keys[: (sequence.prompt_length - 1) // BLOCK]

    def _promised(self, keys: tuple[bytes, ...]) -> int:
        """How many leading blocks a running request is about to have."""
        most = 0
        for other in self.running.values():
            if other.in_prompt:
                shared = 0
                for key, theirs in zip(keys, other.prompt_keys):
                    if key != theirs:
                        break
                    shared += 1
                most = max(most, shared)
        return most

    def _chunks(self) -> list[Chunk]:
        left = self.config.step_positions
        chunks = [Chunk(sequence, 1) for sequence in self.running.values() if not sequence.in_prompt]
        left -= len(chunks)
        for sequence in self.running.values():
            if sequence.in_prompt and left > 0:
                chunks.append(Chunk(sequence, min(left, sequence.prompt_length - sequence.computed)))
                left -= chunks[-1].count
        return chunks

    def _to_encode(self, sequence: Sequence, digests: set[bytes]) -> dict[bytes, torch.Tensor]:
        """Those of the images at whose slots `sequence` has come that nobody had before it. An image counts as one query of a request."""
        encode = {}
        for digest in digests:
            if digest not in sequence.asked:
                sequence.asked.add(digest)
                self.counts.image_cache_queries += 1
                self.counts.image_cache_hits += digest in self._images
            if digest not in self._images:
                self.counts.encoder_calls += 1
                encode[digest] = sequence.pixels_of(digest)
                self._images[digest] = None
            self._images.move_to_end(digest)
        return encode

    def _to_forget(self, pictures: list[Picture]) -> list[bytes]:
        """Before what is new is encoded: so it never goes itself."""
        needed = {picture.digest for picture in pictures}.union(
            *(sequence.pending_digests() for sequence in self.running.values())
        )
        forget = []
        for digest in list(self._images):
            if len(self._images) * self._image_bytes <= self.config.image_cache_bytes:
                break
            if digest not in needed:
                del self._images[digest]
                forget.append(digest)
        return forget


def _wanted(chunks: list[Chunk]) -> torch.Tensor:
    """[R]: after the last position of a sequence, or after each of a prompt whose own probabilities are asked for."""
    wanted, at = [], 0
    for chunk in chunks:
        if chunk.sequence.in_prompt and chunk.sequence.sampling.prompt_logprobs:
            wanted += range(at, at + chunk.count)
        elif chunk.completes:
            wanted.append(at + chunk.count - 1)
        at += chunk.count
    return torch.tensor(wanted, dtype=torch.int64)

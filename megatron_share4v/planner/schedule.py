"""The pipeline schedule of one step: in which order each rank works, and when, given how long its pieces take.

1F1B (Narayanan et al. 2019, PipeDream-Flush) and, with several chunks per rank, its interleaved form (Narayanan et al. 2021), in the order of
megatron-core's schedules. P pipeline ranks, V chunks on each, M micro-batches; stage c * P + r is chunk c of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Piece:
    """One pass of one micro-batch through one chunk."""

    kind: Kind
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class Timed:
    """A piece with its times, in seconds from the step's begin."""

    piece: Piece
    start: float
    end: float


@lru_cache(maxsize=4096)
def order(*, rank: int, pipeline: int, virtual: int, micro_batches: int) -> tuple[Piece, ...]:
    """What pipeline rank `rank` does, in order. With virtual > 1, M must be a multiple of P, as the trainer checks."""
    forward = [
        (batch, chunk)
        for group in range(0, micro_batches, pipeline)
        for chunk in range(virtual)
        for batch in _group(group, pipeline, micro_batches)
    ]
    if virtual == 1:
        forward, warm_up = [(batch, 0) for batch in range(micro_batches)], pipeline - rank - 1
    else:
        warm_up = 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline
    warm_up = min(warm_up, len(forward)) if pipeline > 1 else 0
    forwards = [Piece("forward", batch, chunk) for batch, chunk in forward]
    backwards = [Piece("backward", batch, virtual - 1 - chunk) for batch, chunk in forward]
    steady = [piece for pair in zip(forwards[warm_up:], backwards) for piece in pair]
    return (*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :])


def _group(first: int, size: int, micro_batches: int) -> range:
    return range(first, min(first + size, micro_batches))


def most_in_flight(weights: Sequence[float], *, rank: int, pipeline: int, micro_batches: int) -> float:
    """The largest sum of `weights[chunk]` over micro-batches whose forward is done and whose backward is not, on `rank`."""
    held = most = 0.0
    for piece in order(rank=rank, pipeline=pipeline, virtual=len(weights), micro_batches=micro_batches):
        held += weights[piece.chunk] if piece.kind == "forward" else -weights[piece.chunk]
        most = max(most, held)
    return most


def simulate(
    duration: Callable[[int, Kind], float], *, pipeline: int, virtual: int, micro_batches: int, message: float = 0.0
) -> list[list[Timed]]:
    """The pieces of each rank with their times. `duration(stage, kind)` and `message` (between neighbouring stages) are in seconds."""
    stages = pipeline * virtual
    queues = [
        order(rank=rank, pipeline=pipeline, virtual=virtual, micro_batches=micro_batches) for rank in range(pipeline)
    ]
    took = {kind: [duration(stage, kind) for stage in range(stages)] for kind in ("forward", "backward")}
    done: dict[tuple[Kind, int, int], float] = {}
    timeline: list[list[Timed]] = [[] for _ in range(pipeline)]
    free, at, moved = [0.0] * pipeline, [0] * pipeline, True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue):
                piece = queue[at[rank]]
                stage = piece.chunk * pipeline + rank
                ready = _ready(done, piece, stage, stages, message)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = done[piece.kind, piece.micro_batch, stage] = start + took[piece.kind][stage]
                timeline[rank].append(Timed(piece, start, free[rank]))
                at[rank] += 1
                moved = True
    assert all(at[rank] == len(queue) for rank, queue in enumerate(queues)), "the schedule waits for itself"
    return timeline


def _ready(
    done: dict[tuple[Kind, int, int], float], piece: Piece, stage: int, stages: int, message: float
) -> float | None:
    """When what `piece` needs is there; None: not yet computed."""
    if piece.kind == "forward":
        if stage == 0:
            return 0.0
        before, delay = ("forward", piece.micro_batch, stage - 1), message
    elif stage == stages - 1:
        before, delay = ("forward", piece.micro_batch, stage), 0.0
    else:
        before, delay = ("backward", piece.micro_batch, stage + 1), message
    at = done.get(before)
    return None if at is None else at + delay

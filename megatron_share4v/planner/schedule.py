"""Pipeline schedule of one step: order of the passes on each rank, and their times given the durations.

1F1B (Narayanan et al. 2019, PipeDream-Flush) and, with several chunks per rank, its interleaved form (Narayanan et al.
2021), in the order of megatron-core's schedules. P pipeline ranks, V chunks on each, M micro-batches; stage c * P + r
is chunk c of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class PipelinePass:
    """One pass of one micro-batch through one chunk."""

    kind: Kind
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class TimedPass:
    """A pass with its start and end, in seconds from the begin of the step."""

    task: PipelinePass
    start: float
    end: float


@lru_cache(maxsize=4096)
def order(*, rank: int, pipeline: int, virtual: int, micro_batches: int) -> tuple[PipelinePass, ...]:
    """Passes of pipeline rank `rank` in execution order.

    With virtual > 1, M must be a multiple of P, as the trainer checks.
    """
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
    forwards = [PipelinePass("forward", batch, chunk) for batch, chunk in forward]
    backwards = [PipelinePass("backward", batch, virtual - 1 - chunk) for batch, chunk in forward]
    steady = [task for pair in zip(forwards[warm_up:], backwards) for task in pair]
    return (*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :])


def _group(first: int, size: int, micro_batches: int) -> range:
    return range(first, min(first + size, micro_batches))


def peak_in_flight(weights: Sequence[float], *, rank: int, pipeline: int, micro_batches: int) -> float:
    """Peak of the sum of `weights[chunk]` over micro-batches on `rank` between their forward and backward pass."""
    model_state_memory = most = 0.0
    for task in order(rank=rank, pipeline=pipeline, virtual=len(weights), micro_batches=micro_batches):
        model_state_memory += weights[task.chunk] if task.kind == "forward" else -weights[task.chunk]
        most = max(most, model_state_memory)
    return most


def simulate_schedule(
    duration: Callable[[int, Kind], float], *, pipeline: int, virtual: int, micro_batches: int, message: float = 0.0
) -> list[list[TimedPass]]:
    """Simulate the schedule: timed passes of each rank.

    `duration(stage, kind)` and `message` (between neighbouring stages) are in seconds.
    """
    stages = pipeline * virtual
    queues = [
        order(rank=rank, pipeline=pipeline, virtual=virtual, micro_batches=micro_batches) for rank in range(pipeline)
    ]
    took = {kind: [duration(stage, kind) for stage in range(stages)] for kind in ("forward", "backward")}
    done: dict[tuple[Kind, int, int], float] = {}
    timeline: list[list[TimedPass]] = [[] for _ in range(pipeline)]
    free, at, moved = [0.0] * pipeline, [0] * pipeline, True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue):
                task = queue[at[rank]]
                stage = task.chunk * pipeline + rank
                ready = _ready(done, task, stage, stages, message)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = done[task.kind, task.micro_batch, stage] = start + took[task.kind][stage]
                timeline[rank].append(TimedPass(task, start, free[rank]))
                at[rank] += 1
                moved = True
    assert all(at[rank] == len(queue) for rank, queue in enumerate(queues)), "the schedule waits for itself"
    return timeline


def _ready(
    done: dict[tuple[Kind, int, int], float], task: PipelinePass, stage: int, stages: int, message: float
) -> float | None:
    """Time at which the input of `task` arrives; None when it is not computed yet."""
    if task.kind == "forward":
        if stage == 0:
            return 0.0
        before: tuple[Kind, int, int] = ("forward", task.micro_batch, stage - 1)
        delay = message
    elif stage == stages - 1:
        before, delay = ("forward", task.micro_batch, stage), 0.0
    else:
        before, delay = ("backward", task.micro_batch, stage + 1), message
    at = done.get(before)
    return None if at is None else at + delay

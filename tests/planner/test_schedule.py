"""Planned pass order against megatron-core's executed schedules; times and bubbles against known formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from tiny import LENGTH, MICRO_BATCH, micro_batches, tiny_model

from megatron_share4v.planner.schedule import PipelinePass, TimedPass, order, peak_in_flight, simulate_schedule

EXECUTED = [
    (4, 1, 2),
    (4, 1, 5),
    (4, 1, 8),
    (4, 2, 4),
    (4, 2, 8),
    (2, 1, 1),
    (2, 2, 2),
    (2, 2, 6),
    (1, 1, 3),
]  # pipeline, virtual, micro-batches


def execute(cases: list[tuple[int, int, int]]) -> list[tuple[int, list[PipelinePass]]]:
    """Run each case and return its pipeline rank and passes, recorded at chunk outputs and their gradients."""
    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.mcore.optimizer import wrap_ddp
    from megatron_share4v.mcore.schedule import run_schedule
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.initialize import initialize_weights
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    results = []
    for pipeline, virtual, count in cases:
        layout = Layout(pipeline=pipeline, virtual=virtual, data=dist.get_world_size() // pipeline)
        with open_mesh(layout, device=Device("cpu")) as mesh:
            model, parallel = tiny_model(), ParallelConfig(pipeline=pipeline, virtual=virtual)
            bare = build_chunks(model, mesh=mesh, parallel=parallel, dtype=torch.float32)
            initialize_weights(bare, seed=1, model=model)
            chunks = wrap_ddp(bare, mesh=mesh, parallel=parallel)
            batches = list(itertools.islice(itertools.cycle(micro_batches(0)), count))
            numbered = [(number, batch) for number, batch in enumerate(batches)]
            passes: list[PipelinePass] = []

            def call(chunk, item, passes=passes, chunks=chunks):
                number, batch = item
                which = chunks.index(chunk)
                passes.append(PipelinePass("forward", number, which))
                output = chunk(batch)
                output.register_hook(lambda _: passes.append(PipelinePass("backward", number, which)))
                return output

            def loss(item):
                return lambda total: (total, torch.tensor(max(item[1].targets.numel(), 1), dtype=torch.int), None)

            sizes = dict(sequence_length=LENGTH, micro_batch_size=MICRO_BATCH)
            run_schedule(chunks, numbered, mesh=mesh, loss_function=loss, forward_only=False, call=call, **sizes)
            results.append((mesh.coordinates.pipeline, passes))
    return results


def test_planned_order_is_the_executed_one() -> None:
    for ranks in run_world(4, execute, EXECUTED):
        for (pipeline, virtual, count), (rank, passes) in zip(EXECUTED, ranks, strict=True):
            assert tuple(passes) == order(rank=rank, pipeline=pipeline, virtual=virtual, micro_batches=count), (
                pipeline,
                virtual,
                count,
                rank,
            )


def span(timeline: list[list[TimedPass]]) -> float:
    return max(timed.end for rank in timeline for timed in rank)


@pytest.mark.parametrize(("pipeline", "virtual", "count"), [(4, 1, 8), (4, 2, 8), (8, 4, 16), (2, 1, 1), (1, 1, 5)])
def test_equal_stages_have_the_textbook_bubble(pipeline: int, virtual: int, count: int) -> None:
    """Bubble of (P - 1) / V forward and backward passes over a rank's layers (Narayanan et al. 2021, section 2.2)."""
    timeline = simulate_schedule(
        lambda stage, kind: {"forward": 1.0, "backward": 2.0}[kind],
        pipeline=pipeline,
        virtual=virtual,
        micro_batches=count,
    )
    busy = 3.0 * virtual * count
    assert span(timeline) - busy == pytest.approx(3.0 * (pipeline - 1))
    assert all(sum(timed.end - timed.start for timed in rank) == pytest.approx(busy) for rank in timeline)


def test_passes_wait_for_dependencies() -> None:
    took = {"forward": [1.0, 2.5, 0.5, 1.0], "backward": [3.0, 1.0, 2.0, 2.0]}
    timeline = simulate_schedule(
        lambda stage, kind: took[kind][stage], pipeline=2, virtual=2, micro_batches=4, message=0.25
    )
    ends = {
        (t.task.kind, t.task.micro_batch, 2 * t.task.chunk + rank): (t.start, t.end)
        for rank, row in enumerate(timeline)
        for t in row
    }
    assert len(ends) == 2 * 4 * 4
    for (kind, batch, stage), (start, end) in ends.items():
        assert end - start == pytest.approx(took[kind][stage])
        if kind == "forward" and stage:
            assert start >= ends["forward", batch, stage - 1][1] + 0.25
        if kind == "backward":
            assert start >= (
                ends["backward", batch, stage + 1][1] + 0.25 if stage < 3 else ends["forward", batch, 3][1]
            )
    for row in timeline:
        assert all(after.start >= before.end for before, after in itertools.pairwise(row))


def test_slowest_stage_determines_time() -> None:
    timeline = simulate_schedule(
        lambda stage, kind: 3.0 if stage == 1 else 1.0, pipeline=4, virtual=1, micro_batches=50
    )
    assert span(timeline) == pytest.approx(50 * 6.0, rel=0.05)


def test_micro_batches_in_flight() -> None:
    assert [peak_in_flight([1.0], rank=rank, pipeline=4, micro_batches=8) for rank in range(4)] == [4, 3, 2, 1]
    assert (
        peak_in_flight([1.0], rank=0, pipeline=4, micro_batches=2) == 2
        and peak_in_flight([1.0], rank=0, pipeline=1, micro_batches=9) == 1
    )
    # Warm-up of the interleaved schedule, and one forward before the first backward.
    assert peak_in_flight([1.0, 1.0], rank=0, pipeline=4, micro_batches=16) == 2 * 3 + 4 + 1

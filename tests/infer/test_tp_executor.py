"""Generation at several TP sizes from a checkpoint of another layout, and a failing rank.

The model has all that families differ by: own head width, q/k norms, biases, scaled frequencies and a tied head.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_world
from tolerances import LAYOUT_LOGPROB


def write_checkpoint(directory: Path) -> list[list[int]] | None:
    """Write a checkpoint at TP 2 x PP 2; returns greedy answers of the plain reference."""
    import engine_helpers

    from megatron_share4v.checkpoint.store import CheckpointContents, RunState, write_checkpoint
    from megatron_share4v.model.greedy_reference import greedy_generate

    with open_layout(tensor=2, pipeline=2) as mesh:
        chunks = engine_helpers.build(mesh, family="all")
        state = RunState(step=0, consumed_samples=0, plan_fingerprint="")
        contents = CheckpointContents(chunks=chunks, optimizer=None, mesh=mesh, state=state, config_text="run: {}\n")
        write_checkpoint(directory, contents)
        options = {
            "max_new_tokens": 12,
            "stop_ids": frozenset({engine_helpers.EOS}),
            "vocabulary": engine_helpers.VOCABULARY,
        }
        return greedy_generate(chunks, engine_helpers.mixed_prompts(), mesh=mesh, **options)


def open_layout(**degrees: int):
    import torch.distributed as dist

    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    layout = Layout.for_world(ParallelConfig(**degrees), world_size=dist.get_world_size())
    return open_mesh(layout, device=Device("cpu"))


def generate(directory: Path, tensor: int) -> tuple[list[list[int]], list[list[int]], list[float]] | None:
    """On TP rank 0: greedy answers, sampled ones, and a few log-probabilities; other ranks follow."""
    import engine_helpers

    from megatron_share4v.checkpoint.store import load_weights
    from megatron_share4v.infer.request import GenerationRequest, SamplingParams
    from megatron_share4v.infer.tp_executor import run_follower

    with open_layout(tensor=tensor) as mesh:
        chunks = engine_helpers.build(mesh, seed=99, family="all")
        load_weights(directory, chunks=chunks)
        engine = engine_helpers.engine_of(chunks, step_positions=16)
        if not engine.executor.is_leader:
            return run_follower(engine.executor)
        greedy = engine_helpers.ask(engine, engine_helpers.mixed_prompts())
        assert engine.step() == []  # no work, no broadcast
        sampled = engine_helpers.ask(
            engine,
            engine_helpers.mixed_prompts(),
            seeds=list(range(6)),
            temperature=1.0,
            top_p=0.9,
            repetition_penalty=1.2,
        )
        engine.add(
            GenerationRequest(
                "p", engine_helpers.prompt(1), SamplingParams(max_new_tokens=1, logprobs=2, prompt_logprobs=True)
            )
        )
        [event] = engine_helpers.drain(engine)
        engine.close()
        return greedy, sampled, [entry.chosen for entry in event.prompt_logprobs if entry is not None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    directory = tmp_path_factory.mktemp("generation") / "checkpoint"
    return directory, run_world(4, write_checkpoint, directory)[0]


def test_tp_sizes_give_equal_answers_from_a_pipeline_checkpoint(checkpoint: tuple[Path, list[list[int]]]) -> None:
    directory, expected = checkpoint
    [one] = run_world(1, generate, directory, 1)
    assert one[0] == expected
    two, follower = run_world(2, generate, directory, 2)
    assert follower is None and two[:2] == one[:2]
    four = run_world(4, generate, directory, 4)[0]  # two ranks share each of the two key/value heads
    assert four[:2] == one[:2]
    for other in (two, four):
        assert max(abs(a - b) for a, b in zip(other[2], one[2], strict=True)) <= LAYOUT_LOGPROB


def generate_with_failure(rank: int) -> None:
    """Generate with a failure of `rank` in its third step."""
    import engine_helpers
    import torch.distributed as dist

    from megatron_share4v.infer.tp_executor import run_follower

    with open_layout(tensor=2) as mesh:
        engine = engine_helpers.engine_of(engine_helpers.build(mesh))
        runner, steps = engine.executor.runner, iter(range(100))
        run = runner.run

        def failing_run(plan):
            if dist.get_rank() == rank and next(steps) == 2:
                raise RuntimeError(f"rank {rank} fails on purpose")
            return run(plan)

        runner.run = failing_run
        if engine.executor.is_leader:
            engine_helpers.ask(engine, engine_helpers.mixed_prompts())
        else:
            run_follower(engine.executor)


@pytest.mark.parametrize("rank", [0, 1])
def test_failing_rank_ends_the_world_with_its_traceback(rank: int) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)rank {rank} failed:.*in failing_run.*rank {rank} fails on purpose"):
        run_world(2, generate_with_failure, rank)

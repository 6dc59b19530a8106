"""Greedy answers are the same at every layout, batched or alone, and match the argmax of a plain forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from tiny import PATCHES, tiny_model

NEW_TOKENS = 6


def prompts():
    """Prompts of different lengths: with an image, without, and with an image elsewhere."""
    from megatron_share4v.data.loading.prompt import Prompt

    generator = torch.Generator().manual_seed(4)
    result = []
    for length, first_slot in ((9, 1), (5, None), (12, 6)):
        ids = torch.randint(3, 100, (length,), generator=generator)
        slots = (
            torch.arange(first_slot, first_slot + PATCHES)
            if first_slot is not None
            else torch.zeros(0, dtype=torch.int64)
        )
        ids[slots] = 0
        pixels = torch.randint(0, 256, (int(first_slot is not None), 16, 16, 3), generator=generator, dtype=torch.uint8)
        result.append(Prompt(token_ids=ids, image_slots=slots, pixels=pixels))
    return result


def answers(
    tensor: int,
    pipeline: int,
    virtual: int,
    context: int,
    sequence: bool,
    alone: bool,
    stop: frozenset[int],
    vocabulary: int = 100,
) -> list[list[int]]:
    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.greedy_reference import greedy_generate
    from megatron_share4v.model.initialize import initialize_weights
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual=virtual, context=context, sequence=sequence)
    layout = Layout.for_world(parallel, world_size=dist.get_world_size())
    with open_mesh(layout, device=Device("cpu")) as mesh:
        model = tiny_model()
        chunks = build_chunks(model, mesh=mesh, parallel=parallel, dtype=torch.float32)
        initialize_weights(chunks, seed=2, model=model)
        batches = [[prompt] for prompt in prompts()] if alone else [prompts()]
        options = {"max_new_tokens": NEW_TOKENS, "stop_ids": stop, "vocabulary": vocabulary}
        return [ids for part in batches for ids in greedy_generate(chunks, part, mesh=mesh, **options)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    [result] = run_world(1, answers, 1, 1, 1, 1, False, True, frozenset())
    assert [len(ids) for ids in result] == [NEW_TOKENS] * 3 and len({tuple(ids) for ids in result}) == 3
    assert all(0 <= token < 100 for ids in result for token in ids), "a padding row of the head was chosen"
    return result


@pytest.mark.parametrize(
    "layout",
    [(1, 1, 1, 1, False), (2, 1, 1, 1, True), (2, 2, 1, 1, True), (1, 2, 2, 1, False), (1, 2, 1, 2, False)],
    ids=str,
)
def test_every_layout_gives_the_same_answers(
    layout: tuple[int, int, int, int, bool], expected: list[list[int]]
) -> None:
    tensor, pipeline, _, context, _ = layout
    for result in run_world(tensor * pipeline * context, answers, *layout, False, frozenset()):
        assert result == expected


def test_stop_token_ends_only_its_answer(expected: list[list[int]]) -> None:
    stop = expected[0][2]
    [result] = run_world(1, answers, 1, 1, 1, 1, False, False, frozenset({stop}))
    assert result == [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]


def test_ids_beyond_the_tokenizer_are_not_chosen(expected: list[list[int]]) -> None:
    lowest = min(token for ids in expected for token in ids)
    for result in run_world(2, answers, 2, 1, 1, 1, False, False, frozenset(), lowest):
        assert all(token < lowest for ids in result for token in ids)

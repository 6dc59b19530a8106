"""Engine answers equal the plain reference: cached, batched, chunked, or with reused prefixes."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import EOS, VOCABULARY, ask, build, engine_of, mixed_prompts, prompt

from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.infer.request import GenerationRequest, SamplingParams
from megatron_share4v.model.greedy_reference import greedy_generate

NEW = 12


@pytest.fixture(scope="module")
def expected(chunks: list, mesh) -> list[list[int]]:
    """Answers recomputed from the whole sequence for each token."""
    found = greedy_generate(
        chunks, mixed_prompts(), mesh=mesh, max_new_tokens=NEW, stop_ids=frozenset({EOS}), vocabulary=VOCABULARY
    )
    assert len({tuple(answer) for answer in found}) == 6 and len({token for answer in found for token in answer}) > 20
    return found


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "together"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_requests": 2},
        {"prefix_cache": False},
        {"step_positions": 16},
        {"step_positions": 16, "cache_positions": 64},
    ],
    ids=str,
)
def test_answers_equal_the_reference(chunks: list, expected: list[list[int]], options: dict, alone: bool) -> None:
    engine = engine_of(chunks, **options)
    assert ask(engine, mixed_prompts(), alone=alone) == expected
    assert ask(engine, mixed_prompts(), alone=alone) == expected  # again, with the prefix cache of the first round
    assert engine.stats.running == engine.stats.waiting == engine.stats.cache_usage == 0


def test_answers_of_other_families_equal_the_reference(mesh) -> None:
    """With own head width, q/k norms, biases, scaled frequencies and a tied head."""
    chunks = build(mesh, family="all")
    found = greedy_generate(
        chunks, mixed_prompts(), mesh=mesh, max_new_tokens=NEW, stop_ids=frozenset({EOS}), vocabulary=VOCABULARY
    )
    assert len({tuple(answer) for answer in found}) == 6
    for options in ({}, {"step_positions": 16, "cache_positions": 64}):
        assert ask(engine_of(chunks, **options), mixed_prompts()) == found


def test_sampled_answers_do_not_depend_on_the_batch(chunks: list) -> None:
    prompts, seeds = [prompt(seed, length=8 + seed) for seed in range(16)], list(range(16))
    kinds = {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "ignore_eos": True,
    }
    alone = ask(engine_of(chunks), prompts, alone=True, seeds=seeds, **kinds)
    engine = engine_of(chunks)
    assert ask(engine, prompts, seeds=seeds, **kinds) == alone
    assert engine.stats.steps < 40  # the requests were batched
    assert ask(engine, prompts[::-1], seeds=seeds[::-1], **kinds) == alone[::-1]
    others = ask(engine, prompts, seeds=[seed + 100 for seed in seeds], **kinds)
    assert sum(one != other for one, other in zip(alone, others)) > 12


def test_prefix_cache_distinguishes_images(chunks: list, mesh) -> None:
    one, other = (prompt(1, length=44, image_seed=seed) for seed in (1, 2))
    reference = greedy_generate(
        chunks, [one, other], mesh=mesh, max_new_tokens=NEW, stop_ids=frozenset({EOS}), vocabulary=VOCABULARY
    )
    assert reference[0] != reference[1]
    engine = engine_of(chunks)
    assert ask(engine, [one, other, one], alone=True) == [*reference, reference[0]]
    # The first block has image slots, so `other` reuses nothing of `one`.
    assert engine.stats.prefix_cache_queries == 3 * 48 and engine.stats.prefix_cache_hits == 32
    assert engine.stats.encoder_calls == engine.stats.image_cache_queries == 2
    assert ask(engine_of(chunks, prefix_cache=False), [one, other, one]) == [*reference, reference[0]]


def test_next_turn_reuses_the_cached_prefix(chunks: list) -> None:
    engine = engine_of(chunks, max_positions=64)
    first = prompt(3, length=24)
    [answer] = ask(engine, [first], ignore_eos=True)
    turn = first.token_ids.tolist() + answer + [5, 6, 7, 8]
    second = type(first)(token_ids=torch.tensor(turn), image_slots=first.image_slots, pixels=first.pixels)
    before = engine.stats.computed_prompt_tokens
    [found] = ask(engine, [second], ignore_eos=True)
    assert engine.stats.prefix_cache_hits == 32 and engine.stats.computed_prompt_tokens - before == len(turn) - 32
    assert engine.stats.encoder_calls == 1
    assert [found] == ask(engine_of(chunks, prefix_cache=False), [second], ignore_eos=True)


def test_concurrent_equal_prompts_share_prefill(chunks: list) -> None:
    engine = engine_of(chunks)
    prompts = [prompt(3, length=44)] * 8
    answers = ask(engine, prompts)
    assert len({tuple(answer) for answer in answers}) == 1
    # 47 of 48 positions could be shared; 32 are full blocks.
    assert engine.stats.computed_prompt_tokens == 48 + 7 * 16 and engine.stats.encoder_calls == 1


def test_image_features_are_cached_up_to_the_limit(chunks: list) -> None:
    prompts = [prompt(seed, image_seed=seed % 3) for seed in range(6)]
    expected = ask(engine_of(chunks, prefix_cache=False), prompts)
    for limit, calls in ((1 << 20, 3), (0, 6)):
        engine = engine_of(chunks, prefix_cache=False, image_cache_bytes=limit)
        assert ask(engine, prompts, alone=True) == expected
        assert (engine.stats.image_cache_queries, engine.stats.encoder_calls) == (6, calls)
        assert engine.stats.image_cache_hits == 6 - calls
    engine = engine_of(chunks, prefix_cache=False, image_cache_bytes=0, step_positions=16)
    assert ask(engine, prompts) == expected and engine.stats.encoder_calls <= 6


def test_chunked_prefill_does_not_stall_decoding(chunks: list) -> None:
    engine = engine_of(chunks, step_positions=16, max_requests=4)
    engine.add(
        GenerationRequest("short", prompt(1, length=5, images=0), SamplingParams(max_new_tokens=30, ignore_eos=True))
    )
    engine.step()
    engine.add(
        GenerationRequest("long", prompt(2, length=50, images=1), SamplingParams(max_new_tokens=2, ignore_eos=True))
    )
    steps = [[event.request_id for event in engine.step()] for _ in range(6)]
    assert all("short" in names for names in steps) and ["long" in names for names in steps] == [False] * 3 + [
        True,
        True,
        False,
    ]
    assert engine.stats.computed_prompt_tokens == 5 + 54


def test_invalid_prompts_and_limits_are_rejected(chunks: list) -> None:
    engine = engine_of(chunks)
    ids = prompt(1, images=0)
    with pytest.raises(DataError, match="20 positions and 45 new tokens are 65 positions; 64 are possible"):
        engine.add(GenerationRequest("a", ids, SamplingParams(max_new_tokens=45)))
    with pytest.raises(DataError, match="ids from 1 to 100; the tokenizer has 0 to 99"):
        engine.add(
            GenerationRequest(
                "a", type(ids)(torch.tensor([1, 100]), ids.image_slots, ids.pixels), SamplingParams(max_new_tokens=1)
            )
        )
    with pytest.raises(DataError, match="prompt is empty"):
        engine.add(
            GenerationRequest(
                "a",
                type(ids)(torch.zeros(0, dtype=torch.int64), ids.image_slots, ids.pixels),
                SamplingParams(max_new_tokens=1),
            )
        )
    with pytest.raises(ConfigError, match="max_positions 65 is more than the model's 64"):
        engine_of(chunks, max_positions=65)
    assert not engine.has_work and engine.step() == []
    assert ask(engine, [ids], max_new_tokens=44, ignore_eos=True)[0] != []

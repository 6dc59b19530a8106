"""Random arrivals and cancellations with shared prefixes and images in a small cache do not change answers."""

from __future__ import annotations

import random

import pytest
import torch
from engine_helpers import ask, engine_of, prompt

from megatron_share4v.infer.request import GenerationRequest, SamplingParams


def shared_prefix_prompts(draw: random.Random, count: int) -> list:
    """Prompts that continue a few prefixes in a few ways."""
    found = []
    for _ in range(count):
        base = prompt(
            0, length=38, images=draw.choice((0, 1, 2)), text_seed=draw.randrange(2), image_seed=draw.randrange(2)
        )
        tail = torch.tensor([draw.randrange(3, 6) for _ in range(draw.randrange(4))], dtype=torch.int64)
        whole = base.token_ids.numel()
        keep = draw.choice((whole, whole - 7, whole - 20))
        found.append(type(base)(torch.cat([base.token_ids[:keep], tail]), base.image_slots, base.pixels))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_and_cancellations_keep_answers(chunks: list, seed: int) -> None:
    draw = random.Random(seed)
    prompts = shared_prefix_prompts(draw, 24)
    samplings = [
        SamplingParams(
            max_new_tokens=draw.randint(1, 12),
            temperature=draw.choice((0.0, 1.0)),
            top_p=draw.choice((1.0, 0.8)),
            seed=draw.randrange(3),
            ignore_eos=draw.random() < 0.5,
            prompt_logprobs=draw.random() < 0.2,
            repetition_penalty=draw.choice((1.0, 1.3)),
        )
        for _ in prompts
    ]
    alone = engine_of(chunks, prefix_cache=False)
    expected = [
        ask(alone, [given], **vars(sampling) | {"seeds": [sampling.seed]})[0]
        for given, sampling in zip(prompts, samplings)
    ]
    limits = {
        "step_positions": draw.choice((16, 40)),
        "max_requests": 6,
        "cache_positions": draw.choice((130, 300)),
        "image_cache_bytes": 600,
    }
    engine = engine_of(chunks, **limits)
    waiting = [GenerationRequest(str(number), *pair) for number, pair in enumerate(zip(prompts, samplings))]
    draw.shuffle(waiting)
    answers: dict[str, list[int]] = {request.id: [] for request in waiting}
    ends: dict[str, str] = {}
    cancelled = set(draw.sample(sorted(answers), 4))
    while waiting or engine.has_work:
        while waiting and draw.random() < 0.4:
            engine.add(waiting.pop())
        if draw.random() < 0.1:
            for name in cancelled:
                engine.cancel(name)
        for event in engine.step():
            assert event.request_id not in ends
            if event.token_id is not None:
                answers[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                ends[event.request_id] = event.finish_reason
    assert set(ends) == set(answers) and {name for name, end in ends.items() if end == "cancelled"} <= cancelled
    for name, answer in answers.items():
        whole = expected[int(name)]
        assert answer == (whole[: len(answer)] if ends[name] == "cancelled" else whole), name
    stats = engine.stats
    assert stats.prefix_cache_hits > 0 and stats.running == stats.waiting == stats.cache_usage == 0

"""Each sampling rule against its definition; draws follow the distribution and the seed alone."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_share4v.infer.request import SamplingParams
from megatron_share4v.infer.sampler import SamplingRow, compute_logprobs, sample_tokens

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -4.0]])


def row(
    seed: int = 0,
    generated: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
    **options: object,
) -> SamplingRow:
    sampling = SamplingParams(max_new_tokens=1, **options)
    return SamplingRow(
        sampling=sampling, seed=seed, prompt_ids=frozenset(prompt), generated=generated, forbidden=frozenset(forbidden)
    )


def frequencies(draws: int, **options: object) -> torch.Tensor:
    """Relative frequencies of the ids over `draws` seeds."""
    ids = sample_tokens(LOGITS.expand(draws, -1), [row(seed, **options) for seed in range(draws)])
    return torch.bincount(torch.tensor(ids), minlength=6) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    expected = (LOGITS[0] / temperature).softmax(0)
    # Four standard deviations of a frequency over 8000 draws.
    assert (
        (frequencies(8000, temperature=temperature) - expected).abs() <= 4 * (expected * (1 - expected) / 8000).sqrt()
    ).all()


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 2}, 2),
        ({"top_k": 50}, 6),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.75}, 2),
        ({"top_p": 1.0}, 6),
        ({"min_p": 0.2}, 3),
        ({"top_k": 3, "top_p": 0.9}, 3),
        ({"top_k": 2, "top_p": 0.7}, 1),  # of what top-k left, the first has 0.73
    ],
)
def test_filters_keep_the_most_likely_ids(options: dict, kept: int) -> None:
    found = frequencies(3000, temperature=1.0, **options)
    probabilities = LOGITS[0].softmax(0)
    expected = torch.where(torch.arange(6) < kept, probabilities, 0.0)
    expected /= expected.sum()
    assert not found[kept:].any() and (found - expected).abs().max() <= 4 * 0.5 / math.sqrt(3000)


def test_nucleus_wider_than_the_candidates() -> None:
    flat = torch.zeros(1, 2000)
    flat[0, :1000] += 1e-3
    ids = sample_tokens(flat.expand(400, -1), [row(seed, temperature=1.0, top_p=0.5) for seed in range(400)])
    assert max(ids) < 1000 and len(set(ids)) > 250


def test_greedy_ignores_the_seed() -> None:
    assert (
        sample_tokens(
            LOGITS.expand(5, -1), [row(seed, temperature=t) for seed, t in enumerate((0.0, 0.0, 0.001, 0.001, 0.0))]
        )
        == [0] * 5
    )


def test_draws_depend_on_seed_and_token_index_only() -> None:
    logits = torch.randn(16, 500, generator=torch.Generator().manual_seed(1))
    kinds = [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}, {"repetition_penalty": 1.3}]
    rows = [row(seed, generated=tuple(range(seed)), **{"temperature": 0.9, **kinds[seed % 6]}) for seed in range(16)]
    together = sample_tokens(logits, rows)
    assert together == [sample_tokens(logits[n : n + 1], [one])[0] for n, one in enumerate(rows)]
    assert sample_tokens(logits.flip(0), rows[::-1]) == together[::-1]
    again = [row(7, generated=(1,) * count, temperature=1.0) for count in range(16)]
    assert len(set(sample_tokens(logits[:1].expand(16, -1), again))) > 8


def test_penalties() -> None:
    assert sample_tokens(LOGITS, [row(repetition_penalty=3.0, prompt=(0,))]) == [1]
    assert sample_tokens(LOGITS, [row(repetition_penalty=3.0, generated=(0,))]) == [1]
    below = torch.tensor([[-1.0, -1.1]])
    assert sample_tokens(below, [row(repetition_penalty=1.5, prompt=(0,))]) == [1]
    assert sample_tokens(LOGITS, [row(presence_penalty=1.5, prompt=(0,))]) == [0]
    assert sample_tokens(LOGITS, [row(presence_penalty=1.5, generated=(0,))]) == [1]
    assert sample_tokens(LOGITS, [row(frequency_penalty=0.6, generated=(0,))]) == [0]
    assert sample_tokens(LOGITS, [row(frequency_penalty=0.6, generated=(0, 0))]) == [1]
    assert sample_tokens(LOGITS, [row(forbidden=(0, 1))]) == [2]
    assert LOGITS[0, 0] == 2.0


def test_logprobs_use_raw_logits() -> None:
    expected = LOGITS[0].log_softmax(0).tolist()
    [found] = compute_logprobs(LOGITS, [3], alternatives=2)
    assert found.chosen == expected[3] and found.top == ((0, expected[0]), (1, expected[1]))
    assert compute_logprobs(LOGITS, [3], alternatives=0)[0].top == ()

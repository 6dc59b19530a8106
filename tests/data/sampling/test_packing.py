"""Packs: complete and within bounds, best fit compared with a reference, and fill at ShareGPT4V lengths."""

import hashlib

import numpy as np
import pytest

from megatron_share4v.data.sampling.packing import Packing, best_fit, concatenate_packs, even_fill, pack_samples


def _lengths(count: int, *, longest: int) -> np.ndarray:
    numbers = np.arange(count, dtype=np.int64)
    return 1 + numbers * 7919 % longest


def _plain(lengths: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [content for content in packs if sum(content) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


def _contents(lengths: list[int], pack_of: list[int]) -> list[list[int]]:
    packs: dict[int, list[int]] = {}
    for length, number in zip(lengths, pack_of, strict=True):
        packs.setdefault(number, []).append(length)
    return [packs[number] for number in range(len(packs))]


@pytest.mark.parametrize("count, capacity", [(200, 100), (1, 100), (64, 500)])
def test_best_fit_is_that_of_the_textbook(count: int, capacity: int):
    lengths = sorted(_lengths(count, longest=capacity).tolist(), reverse=True)
    pack_of, packs = best_fit(lengths, capacity)
    # The choice between two packs with equal free space is arbitrary and changes contents; compare count and fill.
    assert packs == len(_plain(lengths, capacity))
    assert sorted(map(sum, _contents(lengths, pack_of))) == sorted(map(sum, _plain(lengths, capacity)))


@pytest.mark.parametrize(
    "count, capacity, window", [(200, 100, 200), (205, 100, 50), (1, 100, 8), (64, 500, 16), (0, 10, 4)]
)
def test_every_sample_is_in_one_pack_of_its_window(count: int, capacity: int, window: int):
    lengths, rows = _lengths(count, longest=capacity), np.arange(count)[::-1].copy()
    packs = pack_samples(rows, lengths[rows], Packing(length=capacity, window=window))
    assert np.array_equal(np.sort(packs.rows), np.arange(count))
    for start, end in zip(packs.bounds, packs.bounds[1:]):
        content = packs.rows[start:end]
        assert len(content) and lengths[content].sum() <= capacity
        assert len(set((count - 1 - content) // window)) == 1
    lower_bound = -(-int(lengths.sum()) // capacity)
    assert len(packs) <= lower_bound * 1.3 + count // window + 1


def test_even_fill_needs_fewer_packs_for_like_lengths():
    lengths = sorted((700 + _lengths(500, longest=300)).tolist(), reverse=True)
    even, best = (way(lengths, 4096) for way in (even_fill, best_fit))
    assert max(map(sum, _contents(lengths, even[0]))) <= 4096 and len(_contents(lengths, even[0])) == even[1]
    assert even[1] < best[1]


def test_rows_of_and_join():
    first, second = (pack_samples(np.arange(5), np.array([4, 3, 3, 2, 2]), Packing(length=6)) for _ in range(2))
    both = concatenate_packs([first, second], offsets=[0, 5])
    assert len(both) == len(first) * 2 and np.array_equal(both.rows[:5] + 5, both.rows[5:])
    rows, counts = both.rows_of(np.array([3, 0]))
    assert rows.tolist() == [*both.rows[both.bounds[3] : both.bounds[4]], *both.rows[: both.bounds[1]]]
    assert counts.tolist() == [both.bounds[4] - both.bounds[3], both.bounds[1]]


def test_golden_hash():
    """Golden hashes of the packs: if this fails, old runs can no longer be resumed."""
    packs = pack_samples(np.arange(3000), _lengths(3000, longest=900), Packing(length=1024, window=512))
    assert (
        hashlib.sha256(packs.rows.astype("<i8").tobytes() + packs.bounds.astype("<i8").tobytes()).hexdigest()[:16]
        == "4cec10f956024a01"
    )


def test_a_caption_data_set_is_packed_tightly():
    """Samples with an image of 576 positions and about 200 words, as in ShareGPT4V captions."""
    lengths = 576 + 100 + np.random.RandomState(0).gamma(4, 30, 20_000).astype(np.int64).clip(1, 1400)
    packs = pack_samples(np.arange(20_000), lengths, Packing(length=4096))
    assert lengths.sum() / (len(packs) * 4096) > 0.95

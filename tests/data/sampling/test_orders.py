"""Orders of an epoch: golden hashes, and LLaVA's length grouping compared with a simple reimplementation."""

import hashlib

import numpy as np
import pytest

from megatron_share4v.data.sampling.orders import block_order, modality_length_order, random_order, select_items


def _hash(order: np.ndarray) -> str:
    return hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16]


def _words(count: int) -> np.ndarray:
    numbers = np.arange(count, dtype=np.int64)
    return (5 + numbers * 7919 % 101) * np.where(numbers % 5 == 3, -1, 1)


def test_golden_hashes():
    """Golden hashes of the orders: if this fails, old runs can no longer be resumed."""
    assert _hash(random_order(1000, seed=42, epoch=0)) == "03680ad22ea38e4b"
    assert _hash(random_order(1000, seed=42, epoch=1)) == "c01f68b2939f6d6e"
    assert _hash(random_order(1000, seed=-1, epoch=0)) == "1dbc2888d9502d4e"
    assert (
        _hash(modality_length_order(_words(1000), group_size=32, batch_size=4, seed=42, epoch=0)) == "3bfd37e22bb2c05b"
    )
    assert _hash(block_order(1000, block_size=16, window=8, seed=42, epoch=0)) == "c1024401867bc40e"
    assert _hash(select_items(1000, take=300, seed=42, epoch=3, source=1)) == "bd0f5308015af0fd"


def test_random_order_visits_each_once_and_depends_on_seed_and_epoch():
    orders = [random_order(500, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(np.array_equal(np.sort(order), np.arange(500)) for order in orders)
    assert len({_hash(order) for order in orders}) == 3
    assert np.array_equal(orders[0], random_order(500, seed=1, epoch=0))


@pytest.mark.parametrize(
    "count, group_size, batch_size", [(1000, 32, 4), (203, 16, 1), (64, 64, 8), (7, 16, 4), (330, 30, 5)]
)
def test_groups_hold_one_modality_and_the_rest_comes_last(count: int, group_size: int, batch_size: int):
    words = _words(count)
    order = modality_length_order(words, group_size=group_size, batch_size=batch_size, seed=3, epoch=1)
    assert np.array_equal(np.sort(order), np.arange(count))
    sizes = [int((words > 0).sum()), int((words < 0).sum())]
    whole = sum((size - 1) // group_size * group_size for size in sizes)
    for group in order[:whole].reshape(-1, group_size):
        assert len(set(np.sign(words[group]))) == 1
    assert np.array_equal(order[whole:], np.sort(order[whole:]))


@pytest.mark.parametrize("count", [1000, 203, 331])
def test_over_epochs_only_the_groups_at_their_boundaries_mix(count: int):
    words, group_size = _words(count), 32
    options = {"group_size": group_size, "batch_size": 4, "seed": 3}
    epochs = [modality_length_order(words, epoch=epoch, offset=epoch * count, **options) for epoch in range(4)]
    assert all(np.array_equal(np.sort(order), np.arange(count)) for order in epochs)
    stream = np.concatenate(epochs)
    mixed = [
        n
        for n, group in enumerate(stream[: len(stream) // group_size * group_size].reshape(-1, group_size))
        if len(set(np.sign(words[group]))) > 1
    ]
    # Fewer than two groups of each kind move across the end of an epoch.
    near = {end * count // group_size + shift for end in range(1, 5) for shift in (-2, -1, 0)}
    assert set(mixed) <= near and len(mixed) < 3 * 4


def _llava_batches(group: list[int], lengths: list[int], num_batches: int) -> list[list[int]]:
    """Assign samples, longest first, to the batch with the least load that has free slots."""
    room = len(group) // num_batches
    batches, loads = [[] for _ in range(num_batches)], [0.0] * num_batches
    for item in sorted(group, key=lambda i: lengths[i], reverse=True):
        lightest = loads.index(min(loads))
        batches[lightest].append(item)
        loads[lightest] = float("inf") if len(batches[lightest]) == room else loads[lightest] + lengths[item]
    return batches


def test_groups_are_dealt_by_the_official_rule():
    words = _words(400)
    order = modality_length_order(words, group_size=40, batch_size=5, seed=7, epoch=0)
    for group in order[:240].reshape(-1, 40):
        # The order of equal lengths is arbitrary, so lengths are compared.
        expected = _llava_batches(group.tolist(), np.abs(words).tolist(), 8)
        assert np.abs(words[group]).reshape(8, 5).tolist() == [
            [abs(int(words[i])) for i in batch] for batch in expected
        ]
        loads = np.abs(words[group]).reshape(8, 5).sum(axis=1)
        assert loads.max() - loads.min() <= np.abs(words[group]).max()


def test_one_modality_alone():
    words = np.abs(_words(100))
    order = modality_length_order(words, group_size=16, batch_size=4, seed=0, epoch=0)
    assert np.array_equal(np.sort(order), np.arange(100))
    # The short last group is strided: 4 samples from long to short become 4 batches of one.
    assert np.all(np.diff(words[order[96:]]) <= 0)
    assert np.array_equal(
        np.sort(modality_length_order(-words, group_size=16, batch_size=4, seed=0, epoch=0)), np.arange(100)
    )


@pytest.mark.parametrize("count", [1, 63, 64, 1000])
def test_blocks_are_permuted_and_shuffled_in_windows(count: int):
    order = block_order(count, block_size=8, window=4, seed=1, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(count))
    if count == 1000:
        blocks = [set((window // 8).tolist()) for window in order.reshape(-1)[: 31 * 32].reshape(-1, 32)]
        assert max(len(found) for found in blocks) <= 5, "a window reads few places"
        assert len(set.union(*blocks)) >= 124
        assert not np.array_equal(order[:32], np.sort(order[:32]))
        assert _hash(order) != _hash(block_order(count, block_size=8, window=4, seed=1, epoch=3))


def test_selection_visits_all_alike():
    assert np.array_equal(select_items(7, take=7, seed=0, epoch=5, source=0), np.arange(7))
    for take in (3, 10, 25):
        visits = np.zeros(10, dtype=int)
        for epoch in range(8):
            chosen = select_items(10, take=take, seed=4, epoch=epoch, source=2)
            assert len(chosen) == take and np.all(np.diff(chosen) >= 0)
            visits += np.bincount(chosen, minlength=10)
            assert visits.max() - visits.min() <= 1

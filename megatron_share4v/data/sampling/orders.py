"""Order in which an epoch visits its items (samples or packs): pure functions of seed, epoch and lengths.

Random numbers are splitmix64 of a counter, sorted stably: unlike library generators, they cannot change between
versions. N samples; an order is [N] int64 row numbers, each once.
"""

from __future__ import annotations

import numpy as np

_MASK = 0xFFFFFFFFFFFFFFFF
# Independent streams of random keys within one epoch.
_IMAGES, _TEXTS, _GROUPS, _SAMPLES, _BLOCKS, _WITHIN, _SELECTION = range(7)


def random_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permute `count` samples."""
    return _permutation(count, seed=seed, epoch=epoch, stream=_SAMPLES)


def block_order(count: int, *, block_size: int, window: int, seed: int, epoch: int) -> np.ndarray:
    """Permute blocks of consecutive rows and shuffle inside windows of blocks, for storage with fast sequential reads.

    Blocks of `block_size` rows are permuted; samples are shuffled inside windows of `window` blocks, so a window reads
    `window` contiguous ranges.
    """
    blocks = _permutation(-(-count // block_size), seed=seed, epoch=epoch, stream=_BLOCKS)
    rows = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
    rows = rows[rows < count]
    shuffled = _permutation(count, seed=seed, epoch=epoch, stream=_WITHIN)
    return rows[shuffled[np.argsort(shuffled // (block_size * window), kind="stable")]]


def select_items(count: int, *, take: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """Items of source number `source` (of `count` items) that epoch `epoch` of a blend visits.

    Returns [take] int64, ascending, with repeats where take > count. Each epoch continues one endless cycle over a
    permutation where the previous epoch stopped, so no item is ever two visits ahead of another.
    """
    if take == count:
        return np.arange(count, dtype=np.int64)
    cycle = _permutation(count, seed=seed, epoch=source, stream=_SELECTION)
    return np.sort(cycle[np.arange(epoch * take, (epoch + 1) * take) % count])


def modality_length_order(
    words: np.ndarray, *, group_size: int, batch_size: int, seed: int, epoch: int, offset: int = 0
) -> np.ndarray:
    """LLaVA's group_by_modality_length: groups of one modality and near-equal length.

    words: [N], length of each sample, negative for text only, never 0. group_size is LLaVA's world size x accumulation
    x batch per device, batch_size its batch per device. Each modality is shuffled and cut into groups; a group is
    sorted from long to short and dealt into batches of near-equal total length; the groups of both modalities are
    shuffled, and the last group of each modality, whole or not, closes the epoch, merged and sorted by row. All other
    groups hold one modality.
    Source: LLaVA, get_modality_length_grouped_indices.

    offset: position in the stream of epochs at which this one begins. When it lies inside a group, that group is filled
    with merged samples: only the one group around each epoch boundary mixes modalities. (LLaVA's epochs end with a
    short batch.)
    """
    lengths = np.abs(words.astype(np.int64))
    modalities = [(np.flatnonzero(words > 0), _IMAGES), (np.flatnonzero(words < 0), _TEXTS)]
    orders = []
    for rows, stream in modalities:
        shuffled = rows[_permutation(len(rows), seed=seed, epoch=epoch, stream=stream)]
        orders.append(_deal_groups(shuffled, lengths, group_size=group_size, num_batches=group_size // batch_size))
    if not all(len(order) for order in orders):
        return np.concatenate(orders)
    # As in LLaVA, the last group of each modality is held back even when it is whole.
    held_back = [(len(order) - 1) // group_size * group_size for order in orders]
    groups = np.concatenate([order[:end] for order, end in zip(orders, held_back)]).reshape(-1, group_size)
    groups = groups[_permutation(len(groups), seed=seed, epoch=epoch, stream=_GROUPS)]
    last = np.concatenate([order[end:] for order, end in zip(orders, held_back)])
    lead = -offset % group_size
    if lead > len(last) and len(groups):
        groups, last = groups[:-1], np.concatenate([groups[-1], last])
    last = np.sort(last)
    return np.concatenate([last[:lead], groups.reshape(-1), last[lead:]])


def _deal_groups(rows: np.ndarray, lengths: np.ndarray, *, group_size: int, num_batches: int) -> np.ndarray:
    """Cut `rows` into groups, sort each by length and deal it into `num_batches` batches."""
    whole = len(rows) // group_size * group_size
    dealt = _deal(_long_to_short(rows[:whole].reshape(-1, group_size), lengths), lengths, num_batches=num_batches)
    rest = _long_to_short(rows[whole:][None], lengths)
    if rest.shape[1] % num_batches:
        rest = np.concatenate([rest[:, first::num_batches] for first in range(num_batches)], axis=1)
    else:
        rest = _deal(rest, lengths, num_batches=num_batches)
    return np.concatenate([dealt.reshape(-1), rest.reshape(-1)])


def _long_to_short(groups: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sort each group of rows by falling length."""
    return np.take_along_axis(groups, np.argsort(-lengths[groups], axis=1, kind="stable"), axis=1)


def _deal(groups: np.ndarray, lengths: np.ndarray, *, num_batches: int) -> np.ndarray:
    """Deal each group's samples, in order, to the batch with the least length that is not full; all groups at once.

    groups: [G, K] rows -> [G, K] rows, batch after batch.
    """
    count, size = groups.shape
    capacity = size // num_batches
    batches = np.empty((count, num_batches, capacity), dtype=np.int64)
    load = np.zeros((count, num_batches), dtype=np.int64)
    filled = np.zeros((count, num_batches), dtype=np.int64)
    every = np.arange(count)
    for column in range(size if count else 0):
        batch = load.argmin(axis=1)
        rows = groups[:, column]
        batches[every, batch, filled[every, batch]] = rows
        filled[every, batch] += 1
        load[every, batch] += lengths[rows]
        load[every, batch] = np.where(filled[every, batch] == capacity, np.iinfo(np.int64).max, load[every, batch])
    return batches.reshape(count, size)


def _permutation(count: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Argsort of splitmix64 over a counter, keyed by (seed, epoch, stream)."""
    state = np.zeros(1, dtype=np.uint64)
    for value in (seed, epoch, stream):
        state = _splitmix64(state ^ np.uint64(value & _MASK))
    return np.argsort(_splitmix64(state + np.arange(count, dtype=np.uint64)), kind="stable")


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014); arithmetic modulo 2^64."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

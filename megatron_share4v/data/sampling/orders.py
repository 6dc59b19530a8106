"""In what order an epoch visits its items (samples or packs): pure functions of (seed, epoch) and, for one of them, of the samples' lengths.

Random numbers are splitmix64 of a counter, sorted stably: unlike library generators, they cannot change between versions.
N samples; an order is [N] int64 row numbers, each once.
"""

from __future__ import annotations

import numpy as np

_MASK = 0xFFFFFFFFFFFFFFFF
_IMAGES, _TEXTS, _GROUPS, _SAMPLES, _BLOCKS, _WITHIN, _SELECTION = range(
    7
)  # independent streams of random keys within one epoch


def random_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` samples."""
    return _permutation(count, seed=seed, epoch=epoch, stream=_SAMPLES)


def block_order(count: int, *, block_size: int, window: int, seed: int, epoch: int) -> np.ndarray:
    """For storage that likes consecutive reads: blocks of `block_size` consecutive rows are permuted, and samples are shuffled inside windows of
    `window` blocks. So a window reads `window` contiguous pieces.
    """
    blocks = _permutation(-(-count // block_size), seed=seed, epoch=epoch, stream=_BLOCKS)
    rows = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
    rows = rows[rows < count]
    shuffled = _permutation(count, seed=seed, epoch=epoch, stream=_WITHIN)
    return rows[shuffled[np.argsort(shuffled // (block_size * window), kind="stable")]]


def select_items(count: int, *, take: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """Which items of source number `source` (it has `count`) epoch `epoch` of a blend visits: [take], ascending, repeated where take > count.

    Each epoch goes on where the one before stopped in one endless cycle over a permutation, so no item is ever two visits ahead of another.
    """
    if take == count:
        return np.arange(count, dtype=np.int64)
    cycle = _permutation(count, seed=seed, epoch=source, stream=_SELECTION)
    return np.sort(cycle[np.arange(epoch * take, (epoch + 1) * take) % count])


def modality_length_order(
    words: np.ndarray, *, group_size: int, batch_size: int, seed: int, epoch: int, offset: int = 0
) -> np.ndarray:
    """LLaVA's group_by_modality_length: groups of one modality and near-equal length.

    words: [N], length of each sample, negative for text only, never 0. group_size is LLaVA's world size x accumulation x batch per device,
    batch_size its batch per device. Each modality is shuffled and cut into groups; a group is sorted from long to short and dealt into
    batches of near-equal total length; the groups of both modalities are shuffled, and each modality's last piece closes the epoch,
    merged and sorted by row. So all other groups hold one modality. Source: LLaVA, get_modality_length_grouped_indices.

    offset: position in the stream of epochs at which this one begins. Where that is inside a group, as many of the merged samples open the epoch as
    fill it: one group around each boundary may mix modalities, and no other. (LLaVA's epochs end with a short batch instead.)
    """
    lengths = np.abs(words.astype(np.int64))
    modalities = [(np.flatnonzero(words > 0), _IMAGES), (np.flatnonzero(words < 0), _TEXTS)]
    orders = []
    for rows, stream in modalities:
        shuffled = rows[_permutation(len(rows), seed=seed, epoch=epoch, stream=stream)]
        orders.append(_deal_groups(shuffled, lengths, group_size=group_size, num_batches=group_size // batch_size))
    if not all(len(order) for order in orders):
        return np.concatenate(orders)
    # The last piece of each modality is held back even where it is whole, as LLaVA does.
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
    """Cut `rows` into groups and order each from inside: sorted by length, then dealt into `num_batches` batches."""
    whole = len(rows) // group_size * group_size
    dealt = _deal(_long_to_short(rows[:whole].reshape(-1, group_size), lengths), lengths, num_batches=num_batches)
    rest = _long_to_short(rows[whole:][None], lengths)
    if rest.shape[1] % num_batches:
        rest = np.concatenate([rest[:, first::num_batches] for first in range(num_batches)], axis=1)
    else:
        rest = _deal(rest, lengths, num_batches=num_batches)
    return np.concatenate([dealt.reshape(-1), rest.reshape(-1)])


def _long_to_short(groups: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.take_along_axis(groups, np.argsort(-lengths[groups], axis=1, kind="stable"), axis=1)


def _deal(groups: np.ndarray, lengths: np.ndarray, *, num_batches: int) -> np.ndarray:
    """Deal each group's samples, in their order, to the batch with the least length that still has room; all groups at once.

    groups: [G, K] rows -> [G, K] rows, batch after batch.
    """
    count, size = groups.shape
    room = size // num_batches
    batches = np.empty((count, num_batches, room), dtype=np.int64)
    load = np.zeros((count, num_batches), dtype=np.int64)
    filled = np.zeros((count, num_batches), dtype=np.int64)
    every = np.arange(count)
    for column in range(size if count else 0):
        batch = load.argmin(axis=1)
        rows = groups[:, column]
        batches[every, batch, filled[every, batch]] = rows
        filled[every, batch] += 1
        load[every, batch] += lengths[rows]
        load[every, batch] = np.where(filled[every, batch] == room, np.iinfo(np.int64).max, load[every, batch])
    return batches.reshape(count, size)


def _permutation(count: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
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

"""Packing of samples into sequences of a fixed length, inside windows: pure arithmetic on lengths.

N samples, K packs. orders.py orders the packs; collate.py places a sample's tokens inside its pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TRIED_WINDOWS = 4


@dataclass(frozen=True)
class Packing:
    """`length`: positions of every sequence; `window`: number of samples among which packs are formed."""

    length: int
    window: int = 2048


@dataclass(frozen=True)
class Packs:
    """`rows`: [N] int64, pack after pack; `bounds`: [K + 1] int64, start of each pack in `rows`."""

    rows: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def rows_of(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate the rows of the given packs, and count the rows of each."""
        counts = self.bounds[packs + 1] - self.bounds[packs]
        firsts = np.repeat(self.bounds[packs] - (np.cumsum(counts) - counts), counts)
        return self.rows[firsts + np.arange(counts.sum())], counts


def pack_samples(rows: np.ndarray, lengths: np.ndarray, packing: Packing) -> Packs:
    """Pack `rows` ([N], in the order in which windows are cut) with `lengths` ([N], 1 .. packing.length).

    Uses the fill method (even_fill or best_fit) that needs fewer packs on a few windows: which is better depends on the
    distribution of the lengths relative to packing.length.
    """
    assert len(rows) == len(lengths) and (not len(lengths) or 0 < lengths.min() <= lengths.max() <= packing.length), (
        "lengths that cannot be packed"
    )
    windows = [slice(start, start + packing.window) for start in range(0, len(rows), packing.window)]
    tried = windows[:: max(1, len(windows) // TRIED_WINDOWS)][:TRIED_WINDOWS]
    fill = min(
        (even_fill, best_fit),
        key=lambda method: sum(method(_falling(lengths[window]), packing.length)[1] for window in tried),
    )
    placed, numbers, count = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)], 0
    for window in windows:
        chosen, opened = fill(_falling(lengths[window]), packing.length)
        placed.append(rows[window][_longest_first(lengths[window])])
        numbers.append(np.asarray(chosen, dtype=np.int64) + count)
        count += opened
    pack_of = np.concatenate(numbers)
    by_pack = np.argsort(pack_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=count))])
    return Packs(rows=np.concatenate(placed)[by_pack], bounds=bounds.astype(np.int64))


def concatenate_packs(parts: list[Packs], *, offsets: list[int]) -> Packs:
    """Concatenate the packs of several sources, adding each offset to the rows of its source."""
    rows = np.concatenate([part.rows + offset for part, offset in zip(parts, offsets)])
    sizes = np.concatenate([np.diff(part.bounds) for part in parts])
    return Packs(rows=rows, bounds=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """Argsort by falling length, stable."""
    return np.argsort(-lengths, kind="stable")


def _falling(lengths: np.ndarray) -> list[int]:
    """Lengths from long to short."""
    return lengths[_longest_first(lengths)].tolist()


def best_fit(lengths: list[int], capacity: int) -> tuple[list[int], int]:
    """Best fit decreasing (Johnson 1973): each length goes to the pack that it leaves with the least free space.

    `lengths` must fall. Returns (pack of each length, number of packs). Good when many samples are short.
    """
    # Bit r of `free` is set when some pack has r free positions: the best fit is the lowest set bit from `length` up.
    packs_with: dict[int, list[int]] = {}
    free, chosen, count = 0, [], 0
    for length in lengths:
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = packs_with[room].pop()
            if not packs_with[room]:
                free ^= 1 << room
        else:
            room, number = capacity, count
            count += 1
        chosen.append(number)
        left = room - length
        if left:
            packs_with.setdefault(left, []).append(number)
            free |= 1 << left
    return chosen, count


def even_fill(lengths: list[int], capacity: int) -> tuple[list[int], int]:
    """Fill packs evenly: each opens with the longest sample left and is shared by samples of equal length.

    `lengths` must fall. Returns (pack of each length, number of packs). Good when samples have similar lengths, as
    captions of single images have; best fit would group these into packs of four that leave no space for a fifth.
    """
    # Bit (capacity - length) of `left` is set when a sample of this length is left: the longest sample up to a limit is
    # the lowest set bit from (capacity - limit) up.
    members: dict[int, list[int]] = {}
    left = 0
    for number, length in enumerate(lengths):
        members.setdefault(length, []).append(number)
        left |= 1 << (capacity - length)
    chosen, count, samples, total = [0] * len(lengths), 0, len(lengths), sum(lengths)
    while samples:
        room, limit = capacity, capacity
        while samples and room:
            if not left >> (capacity - limit):
                limit = room
            fitting = left >> (capacity - limit)
            if not fitting:
                break
            length = limit - (fitting & -fitting).bit_length() + 1
            number = members[length].pop()
            if not members[length]:
                left ^= 1 << (capacity - length)
            chosen[number] = count
            room, samples, total = room - length, samples - 1, total - length
            if samples:
                limit = -(-room // max(1, (2 * room * samples + total) // (2 * total)))
        count += 1
    return chosen, count

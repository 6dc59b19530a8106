"""Allocation of KV cache rows: contiguous ranges for running sequences, and a prefix cache of finished ones.

Pure bookkeeping. A sequence gets all rows it may need at once, in one range: attention reads them in place, and an
admitted request can always finish. A prefix is identified by the key of its last block (prefix_hash.py), which covers
all before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_share4v.infer.prefix_hash import BLOCK_SIZE


@dataclass(eq=False)
class KVRange:
    """`size` cache rows from `start`.

    keys: of its full blocks, in order. cached_blocks: how many of them the prefix cache maps to this range.
    """

    start: int
    size: int
    keys: list[bytes] = field(default_factory=list)
    cached_blocks: int = 0


@dataclass(frozen=True)
class Allocation:
    """Rows for a sequence whose first `reused` positions are to be copied from row `source`."""

    kv_range: KVRange
    source: int
    reused: int


class KVAllocator:
    """First-fit allocator of `size` KV cache rows with an LRU prefix cache."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free_runs: list[tuple[int, int]] = [(0, size)]  # (start, count), sorted, never adjacent
        self._evictable: OrderedDict[KVRange, None] = OrderedDict()  # of finished sequences, least recently used first
        self._cached: dict[bytes, KVRange] = {}

    @property
    def used(self) -> int:
        """Rows of running sequences."""
        return (
            self.size - sum(count for _, count in self._free_runs) - sum(kv_range.size for kv_range in self._evictable)
        )

    @property
    def filled(self) -> int:
        """Rows of running sequences and of the prefix cache."""
        return self.size - sum(count for _, count in self._free_runs)

    def find_longest_prefix(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks found in the prefix cache."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._cached), 0)

    def allocate(self, size: int, keys: Sequence[bytes]) -> Allocation | None:
        """Allocate rows for a sequence; None when no range is free until others finish.

        keys: of the blocks that may be reused. Cached prefixes are evicted when needed.
        """
        blocks = self.find_longest_prefix(keys)
        source = self._cached[keys[blocks - 1]] if blocks else None
        if source is not None and source in self._evictable:
            self._evictable.move_to_end(source)
        start = self._take_free_rows(size, spare=source)
        if start is None and source in self._evictable:
            # Only the rows of the reusable prefix itself are left: evict it.
            source, blocks = None, 0
            start = self._take_free_rows(size, spare=None)
        if start is None:
            return None
        kv_range = KVRange(start, size)
        if source is None:
            return Allocation(kv_range, 0, 0)
        return Allocation(kv_range, source.start, blocks * BLOCK_SIZE)

    def cache_blocks(self, kv_range: KVRange, keys: Sequence[bytes]) -> None:
        """Add the next full blocks of a range to the prefix cache."""
        for key in keys:
            before = self._cached.get(key)
            self._cached[key] = kv_range
            kv_range.keys.append(key)
            kv_range.cached_blocks += 1
            if before is not None:
                before.cached_blocks -= 1
                if not before.cached_blocks and before in self._evictable:
                    self._evict(before)

    def free(self, kv_range: KVRange) -> None:
        """Free a finished sequence's rows; cached blocks stay until evicted."""
        filled = len(kv_range.keys) * BLOCK_SIZE if kv_range.cached_blocks else 0
        if filled < kv_range.size:
            self._return_rows(kv_range.start + filled, kv_range.size - filled)
            kv_range.size = filled
        if filled:
            self._evictable[kv_range] = None
        else:
            self._uncache(kv_range)

    def _take_free_rows(self, size: int, *, spare: KVRange | None) -> int | None:
        """Take `size` free rows, evicting LRU prefixes other than `spare` only if that suffices; returns the start."""
        droppable = [kv_range for kv_range in self._evictable if kv_range is not spare]
        runs = sorted([*self._free_runs, *((kv_range.start, kv_range.size) for kv_range in droppable)])
        if not any(count >= size for _, count in _merge_adjacent(runs)):
            return None
        for kv_range in [None, *droppable]:
            if kv_range is not None:
                self._evict(kv_range)
            for number, (start, count) in enumerate(self._free_runs):
                if count >= size:
                    self._free_runs[number : number + 1] = [(start + size, count - size)] if count > size else []
                    return start
        raise AssertionError(f"no {size} rows in {self._free_runs}, though they were counted")

    def _evict(self, kv_range: KVRange) -> None:
        del self._evictable[kv_range]
        self._uncache(kv_range)
        self._return_rows(kv_range.start, kv_range.size)

    def _uncache(self, kv_range: KVRange) -> None:
        for key in kv_range.keys:
            if self._cached.get(key) is kv_range:
                del self._cached[key]

    def _return_rows(self, start: int, count: int) -> None:
        self._free_runs = _merge_adjacent(sorted([*self._free_runs, (start, count)]))


def _merge_adjacent(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent runs of a sorted list."""
    result: list[tuple[int, int]] = []
    for start, count in runs:
        if result and sum(result[-1]) == start:
            result[-1] = (result[-1][0], result[-1][1] + count)
        else:
            result.append((start, count))
    return result

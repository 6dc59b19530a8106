"""Which rows of the key-value cache belong to whom: runs of rows for running sequences, and what finished ones leave for prompts that begin alike.

Pure bookkeeping. A sequence has all rows that it may ever need from the start, in one run: attention reads them in place, and a request that was
let in can always finish. A prefix is known by the key of its last block (prefix_hash.py), which stands for everything before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_share4v.infer.prefix_hash import BLOCK


@dataclass(eq=False)
class Place:
    """`size` rows from `start` on. keys: of its filled blocks, in order. shown: how many of them the store would find here."""

    start: int
    size: int
    keys: list[bytes] = field(default_factory=list)
    shown: int = 0


@dataclass(frozen=True)
class Reservation:
    """A place for a sequence whose first `reused` positions are to be copied from row `source` on."""

    place: Place
    source: int
    reused: int


class Room:
    """`size` rows."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, count), by start, never touching
        self._kept: OrderedDict[Place, None] = OrderedDict()  # of finished sequences, the least recently used first
        self._found: dict[bytes, Place] = {}

    @property
    def used(self) -> int:
        """Rows that are neither free nor kept for prompts to come."""
        return self.size - sum(count for _, count in self._free) - sum(place.size for place in self._kept)

    @property
    def filled(self) -> int:
        """Rows that are not free."""
        return self.size - sum(count for _, count in self._free)

    def longest(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt are here."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._found), 0)

    def reserve(self, size: int, keys: Sequence[bytes]) -> Reservation | None:
        """Rows for a sequence whose blocks, as far as they may be reused, have `keys`. None: not before others finish. What is kept makes room."""
        blocks = self.longest(keys)
        source = self._found[keys[blocks - 1]] if blocks else None
        if source in self._kept:
            self._kept.move_to_end(source)
        start = self._make_room(size, spare=source)
        if start is None and source in self._kept:
            # Only the room of what could have been reused is left.
            source, blocks = None, 0
            start = self._make_room(size, spare=None)
        if start is None:
            return None
        place = Place(start, size)
        if source is None:
            return Reservation(place, 0, 0)
        return Reservation(place, source.start, blocks * BLOCK)

    def show(self, place: Place, keys: Sequence[bytes]) -> None:
        """The next blocks of `place` are filled; whoever begins alike may use them."""
        for key in keys:
            before = self._found.get(key)
            self._found[key] = place
            place.keys.append(key)
            place.shown += 1
            if before is not None:
                before.shown -= 1
                if not before.shown and before in self._kept:
                    self._drop(before)

    def release(self, place: Place) -> None:
        """Its sequence has ended: keep what is shown, free the rest."""
        filled = len(place.keys) * BLOCK if place.shown else 0
        if filled < place.size:
            self._give(place.start + filled, place.size - filled)
            place.size = filled
        if filled:
            self._kept[place] = None
        else:
            self._forget(place)

    def _make_room(self, size: int, *, spare: Place | None) -> int | None:
        """The start of `size` free rows, taken; least recently used prefixes but `spare` are dropped for it, and only if that helps."""
        droppable = [place for place in self._kept if place is not spare]
        runs = sorted([*self._free, *((place.start, place.size) for place in droppable)])
        if not any(count >= size for _, count in _joined(runs)):
            return None
        for place in [None, *droppable]:
            if place is not None:
                self._drop(place)
            for number, (start, count) in enumerate(self._free):
                if count >= size:
                    self._free[number : number + 1] = [(start + size, count - size)] if count > size else []
                    return start
        raise AssertionError(f"no {size} rows in {self._free}, though they were counted")

    def _drop(self, place: Place) -> None:
        del self._kept[place]
        self._forget(place)
        self._give(place.start, place.size)

    def _forget(self, place: Place) -> None:
        for key in place.keys:
            if self._found.get(key) is place:
                del self._found[key]

    def _give(self, start: int, count: int) -> None:
        self._free = _joined(sorted([*self._free, (start, count)]))


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted runs with neighbours made one."""
    result: list[tuple[int, int]] = []
    for start, count in runs:
        if result and sum(result[-1]) == start:
            result[-1] = (result[-1][0], result[-1][1] + count)
        else:
            result.append((start, count))
    return result

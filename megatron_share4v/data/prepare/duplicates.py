"""Which samples of a data set say or show the same: found from hashes in the rows, all at once. Nothing is removed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Duplicates:
    """Groups of row numbers, in order. records: the same turns about the same image. images: the same bytes under different paths.

    shared: samples whose image another sample has, too, by path: normal in instruction data, stored once.
    """

    records: tuple[tuple[int, ...], ...]
    images: tuple[tuple[int, ...], ...]
    shared: int

    def write(self, path: Path, *, keys: Sequence[str]) -> None:
        """One line of JSON for each group, naming its samples by key."""
        with path.open("w", encoding="utf-8") as file:
            for kind, groups in (("record", self.records), ("image", self.images)):
                file.writelines(
                    json.dumps({"kind": kind, "keys": [keys[row] for row in group]}) + "\n" for group in groups
                )

    def __str__(self) -> str:
        found = [(self.shared, "samples share another's image"), (len(self.records), "groups of equal records")]
        found.append((len(self.images), "groups of equal images under different paths"))
        return ", ".join(f"{count} {what}" for count, what in found if count)


def find_duplicates(
    *, identity: np.ndarray, path: np.ndarray, n_img: np.ndarray, length: np.ndarray, crc32: np.ndarray
) -> Duplicates:
    """All [N]: hash of the turns, number that stands for the image's path, images (0 or 1), bytes and crc32 of the image.

    crc32 and length together take two different images for equal about once in a thousand data sets of a million.
    """
    with_image = np.flatnonzero(n_img)
    _, first = np.unique(path[with_image], return_index=True)
    distinct = with_image[np.sort(first)]
    records = np.stack([identity, np.where(n_img, path, 0).astype(np.uint64)], axis=1)
    images = np.stack([length[distinct], crc32[distinct]], axis=1)
    return Duplicates(
        records=_groups(records, np.arange(len(identity))),
        images=_groups(images, distinct),
        shared=len(with_image) - len(distinct),
    )


def _groups(values: np.ndarray, rows: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """The rows whose values [N, 2] occur more than once."""
    if not len(values):
        return ()
    order = np.lexsort((rows, values[:, 1], values[:, 0]))
    ends = np.flatnonzero((values[order][1:] != values[order][:-1]).any(axis=1)) + 1
    return tuple(sorted(tuple(group.tolist()) for group in _pieces(rows[order], ends)))


def _pieces(rows: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Cut at `ends`, leaving out pieces of one: a million of them would be slow to make."""
    starts = np.concatenate([[0], ends])
    stops = np.concatenate([ends, [len(rows)]])
    several = stops - starts > 1
    return [rows[start:stop] for start, stop in zip(starts[several], stops[several])]

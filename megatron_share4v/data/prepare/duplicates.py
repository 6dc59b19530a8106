"""Duplicate records and images of a data set, found from hashes in its rows. Removes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Duplicates:
    """Groups of row numbers, in order.

    records: equal turns about the same image. images: equal bytes under different paths.
    shared: samples whose image path another sample has as well: normal in instruction data, stored once.
    """

    records: tuple[tuple[int, ...], ...]
    images: tuple[tuple[int, ...], ...]
    shared: int

    def write(self, path: Path, *, keys: Sequence[str]) -> None:
        """Write one JSON line per group, naming its samples by key."""
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
    """Group equal records and equal images.

    All arguments are [N]: hash of the turns, number of the image's path, images (0 or 1), bytes and crc32 of the image.
    crc32 and length together confuse two different images about once in a thousand data sets of a million images.
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
    """Rows whose values [N, 2] occur more than once."""
    if not len(values):
        return ()
    order = np.lexsort((rows, values[:, 1], values[:, 0]))
    ends = np.flatnonzero((values[order][1:] != values[order][:-1]).any(axis=1)) + 1
    return tuple(sorted(tuple(group.tolist()) for group in _split_groups(rows[order], ends)))


def _split_groups(rows: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Split `rows` at `ends`, dropping groups of one row, of which there may be a million."""
    starts = np.concatenate([[0], ends])
    stops = np.concatenate([ends, [len(rows)]])
    several = stops - starts > 1
    return [rows[start:stop] for start, stop in zip(starts[several], stops[several])]

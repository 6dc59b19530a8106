"""Growable structured array: a million rows without a million Python objects."""

from __future__ import annotations

import numpy as np


class GrowingArray:
    """Structured array with amortised appends."""

    def __init__(self, dtype: np.dtype, rows: np.ndarray | None = None) -> None:
        """rows: the initial rows."""
        self._rows = np.empty(1024, dtype=dtype) if rows is None else rows
        self._count = 0 if rows is None else len(rows)

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> np.ndarray:
        """[count] of the dtype; a view, valid until the next `append`."""
        return self._rows[: self._count]

    def append(self, row: tuple[object, ...]) -> None:
        """Append one row."""
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty(max(1024, self._count), dtype=self._rows.dtype)])
        self._rows[self._count] = row
        self._count += 1

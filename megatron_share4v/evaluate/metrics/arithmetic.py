"""Sums, ratios and rounding, bit-identical to the official scripts (Python before 3.12, and NumPy)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable


def add_in_order(values: Iterable[float]) -> float:
    """Sum from left to right without compensation; the built-in sum compensates since Python 3.12."""
    total = 0.0
    for value in values:
        total += value
    return total


def ratio(part: float, whole: float) -> float:
    """Return part / whole; NaN where the official script stops with a division by zero."""
    return part / whole if whole else math.nan


def average(values: Collection[float]) -> float:
    """Mean with a left-to-right sum; NaN without values. NumPy sums fewer than 8 values in this order too."""
    return ratio(add_in_order(values), len(values))


def numpy_round(value: float, decimals: int) -> float:
    """Round like np.round: scale, round half to even, scale back. For 2.675: 2.68, where Python's round gives 2.67."""
    scale = 10.0**decimals
    return round(value * scale) / scale if math.isfinite(value) else value

"""Sums, shares and rounding bit for bit as in the official scripts, which ran on Python before 3.12 and on NumPy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable


def add_in_order(values: Iterable[float]) -> float:
    """Plain left-to-right sum. The built-in one compensates rounding errors since Python 3.12, which moves last digits."""
    total = 0.0
    for value in values:
        total += value
    return total


def ratio(part: float, whole: float) -> float:
    """part / whole; nan where the official script would divide by zero and stop."""
    return part / whole if whole else math.nan


def average(values: Collection[float]) -> float:
    """Mean in order; nan for nothing. NumPy sums fewer than 8 values, and columns of any length, in this order too."""
    return ratio(add_in_order(values), len(values))


def numpy_round(value: float, decimals: int) -> float:
    """np.round: scale, round half to even, scale back. Python's round differs: it gives 2.67 for 2.675, this 2.68."""
    scale = 10.0**decimals
    return round(value * scale) / scale if math.isfinite(value) else value

"""Sums and rounding against hand-computed values and NumPy."""

from __future__ import annotations

import math
import random

import numpy
import pytest

from megatron_share4v.evaluate.metrics.arithmetic import add_in_order, average, numpy_round, ratio


def test_sums_lose_what_the_order_loses() -> None:
    assert add_in_order([1e16, 1.0, -1e16]) == 0.0
    assert add_in_order([1e16, -1e16, 1.0]) == 1.0
    assert add_in_order([0.1, 0.2, 0.3]) == 0.6000000000000001
    assert add_in_order([]) == 0.0


@pytest.mark.parametrize(
    ("value", "decimals", "rounded"),
    [(2.675, 2, 2.68), (0.15, 1, 0.2), (0.25, 1, 0.2), (0.35, 1, 0.4), (66.66, 1, 66.7)],
)
def test_rounding_is_of_the_scaled_value(value: float, decimals: int, rounded: float) -> None:
    assert numpy_round(value, decimals) == rounded


def test_division_by_nothing_is_not_a_number() -> None:
    assert math.isnan(ratio(1, 0)) and math.isnan(average([])) and math.isnan(numpy_round(math.nan, 1))


def test_numpy_agrees() -> None:
    draw = random.Random(0)
    for _ in range(300):
        values = [draw.randint(0, 1000) / draw.choice((10, 30, 1000)) for _ in range(draw.randint(1, 7))]
        assert average(values) == numpy.array(values).mean()
        assert numpy_round(values[0], 1) == round(numpy.float64(values[0]), 1)
        pairs = [(draw.random(), draw.random()) for _ in range(draw.randint(1, 300))]
        assert [average([pair[side] for pair in pairs]) for side in (0, 1)] == numpy.asarray(pairs).mean(0).tolist()

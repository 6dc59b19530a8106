"""Number types of command-line options: accepted and refused values."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from megatron_share4v.config.arguments import above_zero, at_least_zero, natural, positive, share, share_or_zero


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (positive, {"1": 1, "12": 12}, ("0", "-1", "1.5", "", "x", "²")),
        (natural, {"0": 0, "3": 3}, ("-1", "0.5", "")),
        (above_zero, {"0.5": 0.5, "1e-3": 1e-3}, ("0", "-1", "nan", "inf", "x")),
        (share, {"0.62": 0.62, "1": 1.0}, ("0", "1.01", "-0.5", "nan")),
        (share_or_zero, {"0": 0.0, "0.05": 0.05, "1": 1.0}, ("1.5", "-0.1", "inf", "5%")),
        (at_least_zero, {"0": 0.0, "2.5": 2.5}, ("-0.1", "nan", "inf", "")),
    ],
)
def test_accepted_and_refused_numbers(
    check: Callable[[str], float], good: dict[str, float], bad: tuple[str, ...]
) -> None:
    assert {text: check(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is no (whole )?number"):
            check(text)

"""Argument types for argparse that several tools share; argparse prints their errors and ends with exit code 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    return _whole(text, least=1)


def natural(text: str) -> int:
    """Parse a whole number from 0."""
    return _whole(text, least=0)


def above_zero(text: str) -> float:
    """Parse a number above 0."""
    return _number(text, holds=lambda value: value > 0, wanted="above 0")


def at_least_zero(text: str) -> float:
    """Parse a number from 0."""
    return _number(text, holds=lambda value: value >= 0, wanted="from 0")


def share(text: str) -> float:
    """Parse a share of a whole: a number above 0, at most 1."""
    return _number(text, holds=lambda value: 0 < value <= 1, wanted="above 0 and at most 1")


def share_or_zero(text: str) -> float:
    """Parse a number from 0 to 1."""
    return _number(text, holds=lambda value: 0 <= value <= 1, wanted="from 0 to 1")


def model_directory(text: str) -> Path:
    """Parse the path of a checkpoint (or a file that names one), run directory or export, which must not be empty."""
    path = Path(text)
    try:
        is_empty = path.is_dir() and not any(path.iterdir())
        path.stat()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: {error.strerror}; give the directory of a checkpoint, a run or a Hugging Face export"
        ) from error
    if is_empty:
        raise argparse.ArgumentTypeError(f"{text}: is empty; give a checkpoint, a run directory or an export")
    return path


def _number(text: str, *, holds: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value) or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number {wanted}")
    return value


def _whole(text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
    return int(text)

"""Checks of command-line arguments that several tools share, as argparse's `type`. It prints what they raise and ends with exit code 2."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, least=1)


def natural(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, least=0)


def _whole(text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
    return int(text)

"""Prefetch thread: order, bounded lead, errors at their position, and no thread left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from megatron_share4v.data.loading.prefetch import iterate_in_thread, prefetch_to_device
from megatron_share4v.parallel.device import Device


class Source:
    """Iterator that counts requested items and records whether it was closed."""

    def __init__(self, count: int, *, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.made, self.closed = 0, False

    def items(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise ValueError(f"no {number}")
                self.made += 1
                yield number
        finally:
            self.closed = True


def test_order_and_end() -> None:
    source = Source(20)
    assert list(iterate_in_thread(source.items(), depth=3)) == list(range(20))
    assert source.closed and not _threads()


def test_only_a_little_ahead() -> None:
    source = Source(20)
    stream = iterate_in_thread(source.items(), depth=2)
    assert next(stream) == 0
    time.sleep(0.2)
    assert source.made <= 1 + 2
    stream.close()
    assert source.closed and not _threads()


def test_errors_at_their_place() -> None:
    stream = iterate_in_thread(Source(5, fails_at=2).items())
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="no 2"):
        next(stream)
    assert not _threads()


def test_nothing_of_this_on_the_cpu() -> None:
    steps = iter([])
    assert prefetch_to_device(steps, Device("cpu")) is steps


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "reading-ahead"]

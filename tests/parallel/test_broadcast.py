"""Broadcast of tensors of mixed shapes and dtypes: received tensors are bitwise equal to the sent ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import run_world

from megatron_share4v.parallel.broadcast import broadcast_tensors


def _records() -> list[list[torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [
            # Odd byte counts before wider dtypes make slices of the buffer start at unaligned offsets.
            torch.randint(0, 256, (3, 1, 1, 3), generator=generator, dtype=torch.uint8),
            torch.tensor([[True, False, True]]),
            torch.randn(2, 5, generator=generator),
            torch.randint(-5, 5, (7,), generator=generator),
            None,
            torch.randn(3, generator=generator).bfloat16(),
            torch.zeros(0, 4, dtype=torch.int32),
            torch.tensor(2.5),
            torch.arange(12).view(3, 4).T,
        ],
        [None, None],
        [torch.zeros(0)],
    ]


def count_equal_tensors(source: int) -> int:
    """Broadcast all records from `source`; return how many received tensors equal the sent ones."""
    equal = 0
    group = dist.new_group([0, 1, 2])
    for record in _records():
        mine = record if dist.get_rank() == source else None
        received = broadcast_tensors(mine, count=len(record), source=source, group=group, device=torch.device("cpu"))
        assert len(received) == len(record)
        for there, here in zip(received, record):
            assert (there is None) == (here is None)
            equal += there is None or (
                there.dtype == here.dtype and there.shape == here.shape and torch.equal(there, here)
            )
    return equal


def test_tensors_are_equal_from_any_source() -> None:
    total = sum(len(record) for record in _records())
    assert run_world(3, count_equal_tensors, 0) == [total] * 3
    assert run_world(3, count_equal_tensors, 2) == [total] * 3


def broadcast_wrong_count() -> str:
    """Return the message of the AssertionError for a wrong tensor count."""
    try:
        broadcast_tensors([torch.zeros(1)], count=2, source=0, group=dist.group.WORLD, device=torch.device("cpu"))
    except AssertionError as error:
        return str(error)
    return "nothing"


def test_wrong_count_is_an_assertion_error() -> None:
    assert run_world(1, broadcast_wrong_count) == ["(1, 2)"]

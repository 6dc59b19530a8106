"""Shares of rows, dealt turn by turn, become whole again on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import run_world

from megatron_share4v.parallel.collectives import gather_interleaved_rows


def gathered(counts: list[int]) -> bool:
    """On one rank: whether all tensors came out whole."""
    wholes = [torch.arange(count * 6).view(count, 2, 3).to(torch.uint8) for count in counts]
    rank, size = dist.get_rank(), dist.get_world_size()
    received = gather_interleaved_rows([whole[rank::size] for whole in wholes], counts, group=dist.group.WORLD)
    return len(received) == len(wholes) and all(torch.equal(a, b) for a, b in zip(received, wholes))


def check() -> list[bool]:
    return [gathered(counts) for counts in ([5, 0, 2, 3, 1], [0, 0], [1], [6, 3])]


def test_shares_become_whole() -> None:
    assert run_world(3, check) == [[True] * 4] * 3

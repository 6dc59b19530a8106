"""gather_interleaved_rows: rows distributed round-robin are restored on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import run_world

from megatron_share4v.parallel.collectives import gather_interleaved_rows


def gather_and_compare(counts: list[int]) -> bool:
    """Gather tensors with `counts` rows from all ranks; return whether all equal the originals."""
    wholes = [torch.arange(count * 6).view(count, 2, 3).to(torch.uint8) for count in counts]
    rank, size = dist.get_rank(), dist.get_world_size()
    received = gather_interleaved_rows([whole[rank::size] for whole in wholes], counts, group=dist.group.WORLD)
    return len(received) == len(wholes) and all(torch.equal(a, b) for a, b in zip(received, wholes))


def check_counts() -> list[bool]:
    return [gather_and_compare(counts) for counts in ([5, 0, 2, 3, 1], [0, 0], [1], [6, 3])]


def test_gather_restores_interleaved_rows() -> None:
    assert run_world(3, check_counts) == [[True] * 4] * 3

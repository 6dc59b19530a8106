"""Putting together tensors whose rows are dealt out to the ranks of a group, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_shares(
    parts: Sequence[torch.Tensor], counts: Sequence[int], *, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """For each k a tensor of counts[k] rows, of which rank t of the group's T has rows t, t + T, ... as `parts[k]`. One collective in all.

    Every rank must know `counts`; parts: [rows, ...] of one dtype and, but for the first dimension, one shape.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    dealt = [[len(range(turn, count, size)) for count in counts] for turn in range(size)]
    assert [len(part) for part in parts] == dealt[rank], ([len(part) for part in parts], dealt[rank])
    mine = torch.cat(list(parts))
    # Rank 0 has the most rows; a collective wants as many from all.
    padded = mine.new_zeros(sum(dealt[0]), *mine.shape[1:])
    padded[: len(mine)] = mine
    received = [torch.empty_like(padded) for _ in range(size)]
    if padded.numel():
        dist.all_gather(received, padded, group=group)
    wholes = [mine.new_empty(count, *mine.shape[1:]) for count in counts]
    for turn, (rows, lengths) in enumerate(zip(received, dealt)):
        for whole, part in zip(wholes, rows[: sum(lengths)].split(lengths)):
            whole[turn::size] = part
    return wholes

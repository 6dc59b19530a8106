"""Context parallelism: each rank holds a part of every sequence's positions, and for attention alone a part of the heads instead, at all positions.

One exchange before attention and one after it (Jacobs et al. 2023, DeepSpeed Ulysses). Their size per rank shrinks with the number of ranks, causal work is
equal on all of them, and packs need no thought; the price is that no more ranks can share a sequence than there are heads.

C ranks of the context group; S positions of a sequence, L = S / C of them on each rank, in the order of the ranks; B sequences; h and g query and
key/value heads of a tensor rank, d their width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all


def scatter_heads_gather_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[L, B, h, d] and twice [L, B, g, d] -> [S, B, h / C, d] and twice [S, B, max(g / C, 1), d]. C divides h; g and C divide each other."""
    ranks = group.size()
    # Fewer key/value heads than ranks: each serves the query heads of several ranks.
    copies = max(ranks // key.size(2), 1)
    parts = [
        _by_rank(x, ranks)
        for x in (query, key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2))
    ]
    sent = torch.cat(parts, dim=3)
    received = all_to_all(group, sent.flatten(0, 1)).view(-1, *sent.shape[2:])
    query, key, value = received.split([part.size(3) for part in parts], dim=2)
    return query, key, value


def _by_rank(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """[L, B, heads, d] -> [C, L, B, heads / C, d]: the heads of each rank."""
    return x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)


def gather_heads_scatter_sequence(context: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    """What attention made, [S, B, h / C * d] -> [L, B, h * d]."""
    ranks = group.size()
    received = all_to_all(group, context.contiguous())
    return received.unflatten(0, (ranks, -1)).permute(1, 2, 0, 3).flatten(2)

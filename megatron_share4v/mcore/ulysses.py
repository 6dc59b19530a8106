"""Context parallelism by all-to-all around attention (DeepSpeed Ulysses, Jacobs et al. 2023).

Each CP rank holds a part of every sequence's positions; for attention it exchanges them for a part of the heads at all
positions. One all-to-all before attention and one after. Communication per rank shrinks with the number of ranks,
causal work is equal on all of them, and packing needs no special case; the limit is that a sequence cannot be split
over more ranks than there are heads.

S: positions of a sequence, of which each of C CP ranks has L = S / C, in rank order; B: sequences; h, g: query and
key/value heads of a TP rank; d: head width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all


def scatter_heads_gather_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[L, B, h, d] and twice [L, B, g, d] -> [S, B, h / C, d] and twice [S, B, max(g / C, 1), d].

    The head count h must be divisible by C; g and C divide each other.
    """
    ranks = group.size()
    # With fewer key/value heads than ranks, each is copied to several ranks.
    copies = max(ranks // key.size(2), 1)
    shards = [
        _split_heads(x, ranks)
        for x in (query, key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2))
    ]
    sent = torch.cat(shards, dim=3)
    received = all_to_all(group, sent.flatten(0, 1)).view(-1, *sent.shape[2:])
    query, key, value = received.split([shard.size(3) for shard in shards], dim=2)
    return query, key, value


def _split_heads(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """[L, B, heads, d] -> [C, L, B, heads / C, d]: the heads of each rank."""
    return x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)


def gather_heads_scatter_sequence(context: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    """Attention output [S, B, h / C * d] -> [L, B, h * d]."""
    ranks = group.size()
    received = all_to_all(group, context.contiguous())
    return received.unflatten(0, (ranks, -1)).permute(1, 2, 0, 3).flatten(2)

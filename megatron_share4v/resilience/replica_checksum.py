"""Checksums of the weights of data-parallel replicas, which must always be equal.

A rank with other weights has faulty hardware (memory, bus), or met a bug.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_share4v.errors import DamageError
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import gather_updated_params, unwrap_model
from megatron_share4v.parallel.collectives import gather_objects
from megatron_share4v.parallel.layout import Layout

SLICE = 1 << 22
SHOWN = 5


@dataclass(frozen=True)
class RankChecksums:
    """Checksums of one rank: two 64-bit sums over the bits of each parameter, by name."""

    host: str
    sums: dict[str, tuple[int, int]]


def check_replicas(chunks: Sequence[torch.nn.Module], *, mesh: Mesh, step: int) -> None:
    """Compare the weights of all replicas after `step`. Collective, with a host sync.

    Raises DamageError on all ranks, naming the ranks and parameters that differ from the other replicas.
    """
    replicas = mesh.layout.data * mesh.layout.context
    if replicas == 1:
        return
    gather_updated_params(chunks)
    sums = checksums(chunks)
    own = torch.stack(list(sums.values())).to(mesh.device.torch_device)
    gathered = [torch.empty_like(own) for _ in range(replicas)]
    dist.all_gather(gathered, own, group=mesh.dp_cp_group)
    unequal = any(not torch.equal(gathered[0], other) for other in gathered)
    differs = torch.tensor(float(unequal), device=mesh.device.torch_device)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if not differs.item():
        return
    values = {name: (int(pair[0]), int(pair[1])) for name, pair in sums.items()}
    checksums_by_rank = gather_objects(RankChecksums(socket.gethostname(), values))
    where = "; ".join(find_divergent_ranks(checksums_by_rank, mesh.layout))
    raise DamageError(
        f"after step {step} replicas do not hold the same weights: {where}. Take that node out and test its memory; "
        "the run continues from its newest checkpoint, which was compared before it was written"
    )


@torch.no_grad()
def checksums(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return a [2] int64 checksum for each parameter of this rank.

    The sum of its words and the sum weighted by position, both modulo 2**64, so that the order of addition is free.
    """
    word_types = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    sums = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in unwrap_model(chunk).named_parameters():
            words = parameter.detach().reshape(-1).view(word_types[parameter.element_size()])
            total = torch.zeros(2, dtype=torch.int64, device=words.device)
            for start in range(0, len(words), SLICE):
                part = words[start : start + SLICE].to(torch.int64)
                positions = torch.arange(start + 1, start + 1 + len(part), device=words.device)
                total += torch.stack([part.sum(), (part * positions).sum()])
            sums[f"chunk{number}.{name}"] = total
    return sums


def find_divergent_ranks(checksums_by_rank: Sequence[RankChecksums], layout: Layout) -> list[str]:
    """Describe each rank that differs from the majority of its replicas, with the parameters.

    With two replicas there is no majority, and both are named.
    """
    found = []
    for group in layout.groups("context", "data"):
        odd: dict[int, list[str]] = {}
        for name in checksums_by_rank[group[0]].sums:
            values = [checksums_by_rank[rank].sums[name] for rank in group]
            usual, count = Counter(values).most_common(1)[0]
            for rank, value in zip(group, values):
                if value != usual or (count * 2 <= len(group) and len(set(values)) > 1):
                    odd.setdefault(rank, []).append(name)
        found += [f"rank {rank} ({checksums_by_rank[rank].host}) in {_shorten(names)}" for rank, names in odd.items()]
    return found


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""Checksums of the weights of data-parallel replicas, and of the copies of a tied embedding: they must be equal.

A rank with other weights has faulty hardware (memory, bus), or met a bug.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
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
    """Compare the weights of all replicas, and both copies of a tied embedding, after `step`. Collective, with a host
    sync.

    Raises DamageError on all ranks, naming the ranks and parameters that differ from the other replicas.
    """
    tied = mesh.layout.pipeline > 1 and unwrap_model(chunks[0]).share_embeddings_and_output_weights
    if mesh.layout.data * mesh.layout.context == 1 and not tied:
        return
    gather_updated_params(chunks)
    sums = checksums(chunks)
    own = torch.stack(list(sums.values())).to(mesh.device.torch_device)
    unequal = _differs_in_group(own, mesh.dp_cp_group)
    if tied and (mesh.is_first_stage or mesh.is_last_stage):
        copy = sums[find_tied_copy(sums)].to(mesh.device.torch_device)
        unequal = _differs_in_group(copy, mesh.groups.embd) or unequal
    differs = torch.tensor(float(unequal), device=mesh.device.torch_device)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if not differs.item():
        return
    values = {name: (int(pair[0]), int(pair[1])) for name, pair in sums.items()}
    checksums_by_rank = gather_objects(RankChecksums(socket.gethostname(), values))
    where = "; ".join(find_divergent_ranks(checksums_by_rank, mesh.layout, tied=tied))
    raise DamageError(
        f"after step {step} replicas do not hold the same weights: {where}. Take that node out and test its memory; "
        "the run continues from its newest checkpoint, which was compared before it was written"
    )


def _differs_in_group(own: torch.Tensor, group: dist.ProcessGroup) -> bool:
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group=group)
    return any(not torch.equal(gathered[0], other) for other in gathered)


def find_tied_copy(names: Iterable[str]) -> str:
    """Return the name of a rank's copy of the tied embedding: the embedding's on the first stage, or the head's."""
    [name] = [name for name in names if name.endswith(("language.embedding.weight", "language.head.weight"))]
    return name


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


def find_divergent_ranks(
    checksums_by_rank: Sequence[RankChecksums], layout: Layout, *, tied: bool = False
) -> list[str]:
    """Describe each rank that differs from the majority of its replicas, with the parameters.

    With two replicas there is no majority, and both are named; so are both ranks whose copies of a `tied` embedding
    differ, where each equals its replicas.
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
    if not found and tied:
        for group in layout.groups("pipeline"):
            ends = [(rank, checksums_by_rank[rank]) for rank in (group[0], group[-1])]
            if len({one.sums[find_tied_copy(one.sums)] for _, one in ends}) > 1:
                found += [f"rank {rank} ({one.host}) in {find_tied_copy(one.sums)}" for rank, one in ends]
    return found


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

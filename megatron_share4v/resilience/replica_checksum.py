"""Whether data-parallel replicas still hold the same weights. They always must: a rank whose do not has a damaged memory or bus, or met a bug."""

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
class Sums:
    """One rank's: sums[name] are two 64-bit sums over the bits of that parameter."""

    host: str
    sums: dict[str, tuple[int, int]]


def check_replicas(chunks: Sequence[torch.nn.Module], *, mesh: Mesh, step: int) -> None:
    """Raises DamageError, on all ranks, that names ranks and parameters whose weights after `step` are not those of the other replicas. Collective."""
    replicas = mesh.layout.data * mesh.layout.context
    if replicas == 1:
        return
    gather_updated_params(chunks)
    sums = checksums(chunks)
    mine = torch.stack(list(sums.values())).to(mesh.device.torch_device)
    several = [torch.empty_like(mine) for _ in range(replicas)]
    dist.all_gather(several, mine, group=mesh.dp_cp_group)
    differs = torch.tensor(
        float(any(not torch.equal(several[0], other) for other in several)), device=mesh.device.torch_device
    )
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if not differs.item():
        return
    values = {name: (int(pair[0]), int(pair[1])) for name, pair in sums.items()}
    told = gather_objects(Sums(socket.gethostname(), values))
    raise DamageError(
        f"after step {step} replicas do not hold the same weights: {'; '.join(different(told, mesh.layout))}. Take that node out and look at its "
        "memory; the run goes on from its newest checkpoint, which was compared before it was written"
    )


@torch.no_grad()
def checksums(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """[2] int64 for each parameter of this rank: the sum of its words, and the sum weighted by place, both modulo 2**64, so that no order matters."""
    found = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in unwrap_model(chunk).named_parameters():
            words = (
                parameter.detach()
                .reshape(-1)
                .view({1: torch.int8, 2: torch.int16, 4: torch.int32}[parameter.element_size()])
            )
            total = torch.zeros(2, dtype=torch.int64, device=words.device)
            for start in range(0, len(words), SLICE):
                part = words[start : start + SLICE].to(torch.int64)
                places = torch.arange(start + 1, start + 1 + len(part), device=words.device)
                total += torch.stack([part.sum(), (part * places).sum()])
            found[f"chunk{number}.{name}"] = total
    return found


def different(told: Sequence[Sums], layout: Layout) -> list[str]:
    """For each rank that differs from most of its replicas: where. Of two replicas nobody can say which is right, and both are named."""
    found = []
    for group in layout.groups("context", "data"):
        odd: dict[int, list[str]] = {}
        for name in told[group[0]].sums:
            values = [told[rank].sums[name] for rank in group]
            usual, count = Counter(values).most_common(1)[0]
            for rank, value in zip(group, values):
                if value != usual or (count * 2 <= len(group) and len(set(values)) > 1):
                    odd.setdefault(rank, []).append(name)
        found += [f"rank {rank} ({told[rank].host}) in {_listed(names)}" for rank, names in odd.items()]
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

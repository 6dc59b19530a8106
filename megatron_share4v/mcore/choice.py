"""The fused ops of one run: each rank decides by ops/choose.py, and all must have come to the same."""

from __future__ import annotations

import torch.distributed as dist

from megatron_share4v.config.run import Ops
from megatron_share4v.errors import OpsError
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.ops.choose import Available, Choice, choose_ops


def agree_on_ops(requested: Ops, *, mesh: Mesh, available: Available | None = None) -> Choice:
    """This rank's choice, which is every rank's. Collective; of the ranks of one machine, one builds.

    Raises OpsError on every rank, with one message, when `native` was asked for and some rank cannot have it, or when ranks would differ.
    """
    try:
        choice = choose_ops(requested, device=mesh.device.kind, available=available)
        mine = choice.line
    except OpsError as error:
        choice, mine = None, str(error)
    ranks: list = [None] * mesh.layout.world_size
    dist.all_gather_object(ranks, (choice.implementation if choice else None, mine))
    if len({implementation for implementation, _ in ranks}) == 1 and choice:
        return choice
    raise OpsError(_difference(requested, ranks))


def _difference(requested: Ops, ranks: list[tuple[str | None, str]]) -> str:
    """What each rank came to, ranks with the same outcome on one line."""
    members: dict[str, list[int]] = {}
    for rank, (_, said) in enumerate(ranks):
        members.setdefault(said, []).append(rank)
    if len(members) == 1:
        return next(iter(members))
    lines = "".join(f"\nranks {', '.join(map(str, numbers))}: {said}" for said, numbers in members.items())
    return f"ops: {requested} does not lead to the same on every rank; give all machines the same compilers, or set ops: reference.{lines}"

"""Gradient norm by module, to locate a bad total norm. Too slow for every step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_share4v.mcore.dist_checkpoint import named_weights
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import chained_optimizers, optimizer_shards
from megatron_share4v.parallel.collectives import gather_objects

_LAYER = re.compile(r"(.*\blayers\.\d+)\.")


@torch.no_grad()
def grad_norms_by_module(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, *, mesh: Mesh, sharding: dict[str, Any]
) -> dict[str, float]:
    """Return the L2 norm of the gradient of each layer and other module, under global names; equal on all ranks.

    Collective.

    Call after optimizer.prepare_grads() and before gradients are scaled. Only trained modules are listed.
    """
    names = {id(entry.data): entry.key for entry in nested_values(named_weights(chunks, sharding))}
    squares: dict[str, float] = {}
    for part in chained_optimizers(optimizer):
        if not isinstance(part, DistributedOptimizer) and not mesh.is_first_replica:
            continue  # all replicas hold the same gradients
        for shard in optimizer_shards(part):
            gradient = shard.tensors["param"].grad
            counted = param_is_not_shared(shard.parameter) and param_is_not_tensor_parallel_duplicate(shard.parameter)
            if gradient is not None and counted:
                module = _module(names[id(shard.parameter)])
                squares[module] = (
                    squares.get(module, 0.0) + float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
                )
    by_rank = gather_objects(squares)
    modules = dict.fromkeys(module for part in by_rank for module in part)
    return {module: sum(part.get(module, 0.0) for part in by_rank) ** 0.5 for module in modules}


def _module(name: str) -> str:
    layer = _LAYER.match(name)
    return layer[1] if layer else name.rpartition(".")[0]

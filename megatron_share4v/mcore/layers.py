"""megatron-core's tensor-parallel layers and building blocks that model/ uses."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import sharded_state_dict_default

__all__ = [
    "ColumnParallelLinear",
    "LayerList",
    "MegatronModule",
    "ModelType",
    "ModuleSpec",
    "RowParallelLinear",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TransformerBlock",
    "VocabParallelEmbedding",
    "build_module",
    "gather_from_sequence_parallel_region",
    "mark_parallel_weights",
    "mark_tied_copies",
    "scatter_to_sequence_parallel_region",
]


class LayerList(torch.nn.ModuleList):
    """Transformer layers that are all on this rank; checkpoints name them `<prefix><number>.…`, whatever the layout."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the entries of every layer; core's default would treat the layers as unsharded tensors."""
        sharded: dict = {}
        for number, layer in enumerate(self):
            sharded.update(sharded_state_dict_default(layer, f"{prefix}{number}.", sharded_offsets, metadata))
        return sharded


def mark_tied_copies(*, embedding: Any, head: Any) -> None:
    """Mark the two copies of a tied embedding on the first and the last pipeline stage; None on the other stages.

    Core then gives both the same buckets, so that the ranks of the embedding group hold the same part of the gradient
    when they add it up, and leaves the copy of the last stage out of the gradient norm.
    """
    if embedding is not None:
        embedding.shared_embedding = True
    if head is not None:
        head.shared_embedding = head.shared = True


def mark_parallel_weights(model: torch.nn.Module) -> None:
    """Set the tensor-parallel attributes of sharded weights.

    Core sets them only while initializing weights, which this project does itself; without them a weight would count on
    TP rank 0 only in the gradient norm.
    """
    dimension = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        for kind, split in dimension.items():
            if isinstance(module, kind) and module.weight is not None:
                set_tensor_model_parallel_attributes(module.weight, True, split, 1)

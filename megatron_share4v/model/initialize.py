"""Initial weights as a pure function of (seed, global name): the same model at every layout.

Also iterates over this rank's shards of global tensors, which conversion uses: each tensor of a checkpoint has one
global name and shape, and each rank holds a slice of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.mcore.layer_config import residual_init_std
from megatron_share4v.mcore.layers import MegatronModule, ShardedTensor, ShardedTensorFactory

# Layers keep their own names, since some may be frozen and have no optimizer state.
SHARDING = {"non_homogeneous_layers": True}
# Rows beyond the vocabulary get no gradient and stay zero, so that conversion can cut them off and restore them.
PADDED = ("language.embedding.weight", "language.head.weight")


@dataclass(frozen=True)
class TensorShard:
    """Slice of one global tensor on this rank; `data` is a view of the parameter."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor
    replica: bool
    """Whether another rank writes this slice to checkpoints."""

    def slice_from(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this shard's part of the global `tensor`."""
        return tensor[tuple(slice(start, start + size) for start, size in zip(self.offset, self.data.shape))]


def iter_shards(chunks: Iterable[nn.Module]) -> Iterator[TensorShard]:
    """Yield all shards of this rank. Fused matrices appear as the parts that their factories name (gate and up)."""
    for chunk in chunks:
        assert isinstance(chunk, MegatronModule), type(chunk)
        for entry in chunk.sharded_state_dict(metadata=dict(SHARDING)).values():
            yield from _iter_entry_shards(entry)


def _iter_entry_shards(entry: object) -> Iterator[TensorShard]:
    if isinstance(entry, ShardedTensorFactory):
        parts = entry.build()
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _iter_entry_shards(part)
    elif isinstance(entry, ShardedTensor):
        replica = any(entry.replica_id) if isinstance(entry.replica_id, tuple) else bool(entry.replica_id)
        yield TensorShard(entry.key, tuple(entry.global_shape), tuple(entry.global_offset), entry.data, replica)


@torch.no_grad()
def fill_parameters(chunks: Iterable[nn.Module], tensor_for: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Set every parameter from `tensor_for(global name, global shape)`, one global tensor in memory at a time."""
    for shard in iter_shards(chunks):
        value = tensor_for(shard.key, shard.global_shape)
        assert tuple(value.shape) == shard.global_shape, (shard.key, value.shape, shard.global_shape)
        shard.data.copy_(shard.slice_from(value))


def initial_value(key: str, shape: tuple[int, ...], *, seed: int, model: ModelConfig) -> torch.Tensor:
    """Return the fp32 initial value of the global tensor `key`.

    Ones for norms and layer scales, zeros for biases and vocabulary padding, normal for the rest.
    """
    if key.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in key or "layer_scale" in key:
        return torch.ones(shape)
    std = model.init_std
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        num_layers = model.vision.num_layers if key.startswith("vision") else model.language.num_layers
        std = residual_init_std(model, num_layers=num_layers)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(shape).normal_(0.0, std, generator=generator)
    if key in PADDED:
        value[model.language.vocab_size :] = 0.0
    return value


def initialize_weights(chunks: Iterable[nn.Module], *, seed: int, model: ModelConfig) -> None:
    """Initialize all weights, equal for every layout."""
    fill_parameters(chunks, lambda key, shape: initial_value(key, shape, seed=seed, model=model))

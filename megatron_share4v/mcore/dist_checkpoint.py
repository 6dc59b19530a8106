"""Weights and optimizer state of all ranks as global tensors on disk, through megatron-core's dist_checkpointing.

A tensor is stored under its global name with its global shape, whatever the layout: weights as `<name>`, AdamW state of
a trained weight as `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>`, always in fp32. Sharded and unsharded
optimizers write the same tensors, so a run may switch. Optimizer settings are not stored: learning rates and weight
decay come from the run's configuration. Directory names and completeness are handled by checkpoint/.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_share4v.errors import CheckpointError
from megatron_share4v.mcore.async_writer import CheckpointSnapshot, HostBuffers
from megatron_share4v.mcore.optimizer import (
    chained_optimizers,
    gather_updated_params,
    optimizer_shards,
    restore_step_counts,
    step_counts,
    unwrap_model,
)
from megatron_share4v.mcore.optimizer_gather import OptimizerStateGather
from megatron_share4v.parallel.collectives import gather_objects

STATE_PREFIX = "optimizer.state."
STATES = ("param", "exp_avg", "exp_avg_sq")
SHOWN_MISMATCHES = 5

ShardedEntry: TypeAlias = ShardedTensor | ShardedTensorFactory


def take_snapshot(
    directory: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    sharding: dict[str, Any],
    buffers: HostBuffers | None,
) -> CheckpointSnapshot:
    """Snapshot what this rank will write into the empty `directory` (on a file system that all ranks see). Collective.

    `sharding` is passed to the chunks' sharded_state_dict. With `buffers` the tensors are copied to the host, and
    training may continue before they are written. Raises CheckpointError, on all ranks, when the disk has too little
    space.
    """
    gather_updated_params(chunks)
    weights = named_weights(chunks, sharding)
    entries = _build_factories(nested_values(weights))
    live: list[torch.Tensor] = [parameter for chunk in chunks for parameter in chunk.parameters()]
    gathers: list[OptimizerStateGather] = []
    if optimizer is not None:
        entries += _build_factories(_saved_state(optimizer, weights, gathers, buffers))
        live += [
            tensor
            for part in chained_optimizers(optimizer)
            for shard in optimizer_shards(part)
            for tensor in shard.tensors.values()
        ]
    _check_space(directory, entries)

    def fill(group: dist.ProcessGroup | None) -> None:
        for gather in gathers:
            gather.complete(group)

    snapshot = CheckpointSnapshot(buffers, live=live, fill=fill)
    dist_checkpointing.save(_numbered(entries), str(directory), snapshot)
    return snapshot


def load_sharded(
    directory: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    updates: int,
    sharding: dict[str, Any],
) -> None:
    """Load weights and, with an optimizer, its state, in place, whatever layout wrote them. Collective.

    `updates` becomes the step count of every trained parameter. Raises CheckpointError, on all ranks, when names or
    shapes differ.
    """
    weights = named_weights(chunks, sharding)
    entries = _build_factories(nested_values(weights))
    targets = [] if optimizer is None else list(_state_targets(optimizer, weights))
    entries += _build_factories(target.entry for target in targets)
    _check_fit(directory, entries, with_state=optimizer is not None)
    # A rank of a sharded optimizer loads only the parameters that it updates, so no group of ranks covers everything.
    dist_checkpointing.load(_numbered(entries), str(directory), validate_access_integrity=False)
    for target in targets:
        target.copy_shard()
    if optimizer is not None:
        restore_step_counts(optimizer, updates)


def count_updates(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates that the trained parameters, on whatever stage, have had. Collective."""
    counts = gather_objects(set(step_counts(optimizer)))
    different = set[int]().union(*counts)
    assert len(different) == 1, f"parameters had different numbers of updates: {sorted(different)}"
    return different.pop()


@dataclass(frozen=True)
class _LoadTarget:
    """Destination of one tensor of optimizer state.

    `full` is loaded; its part from `start` on belongs to this rank and goes to `local`.
    """

    entry: ShardedEntry
    full: torch.Tensor
    local: torch.Tensor
    start: int

    @torch.no_grad()
    def copy_shard(self) -> None:
        """Copy this rank's part to `local`, unless `full` is a view of it."""
        if self.full.data_ptr() != self.local.data_ptr():
            self.local.view(-1).copy_(self.full.view(-1)[self.start : self.start + self.local.numel()])


def named_weights(chunks: Sequence[torch.nn.Module], sharding: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sharded entries of every chunk, without the extra-state objects that only Transformer Engine fills."""
    found = {
        f"chunk{number}": unwrap_model(chunk).sharded_state_dict(metadata=dict(sharding))
        for number, chunk in enumerate(chunks)
    }
    return {
        chunk: {name: entry for name, entry in entries.items() if isinstance(entry, ShardedEntry)}
        for chunk, entries in found.items()
    }


def _build_factories(entries: Iterable[ShardedEntry]) -> list[ShardedTensor]:
    """Replace fused matrices by their stored parts; the parts are views, so loading fills the parameter."""
    tensors: list[ShardedTensor] = []
    for entry in entries:
        tensors += nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    return tensors


def _numbered(tensors: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _saved_state(
    optimizer: MegatronOptimizer,
    weights: dict[str, Any],
    gathers: list[OptimizerStateGather],
    buffers: HostBuffers | None,
) -> Iterator[ShardedEntry]:
    """Yield the optimizer state entries that this rank writes.

    State that a sharded optimizer splits over ranks is written by the first of them, from buffers that one of `gathers`
    fills.
    """
    by_parameter = {id(entry.data): entry for entry in nested_values(weights)}
    for part in chained_optimizers(optimizer):
        if isinstance(part, DistributedOptimizer):
            local = {id(shard.parameter): shard.tensors for shard in optimizer_shards(part)}
            gathers.append(OptimizerStateGather(part, local, names=STATES, buffers=buffers, label=str(len(gathers))))
            for (parameter, name), full in gathers[-1].full_tensors.items():
                yield _state_entry(by_parameter[parameter], name, full)
        else:
            for shard in optimizer_shards(part):
                for name, tensor in shard.tensors.items():
                    yield _state_entry(by_parameter[id(shard.parameter)], name, tensor.float())


def _state_targets(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> Iterator[_LoadTarget]:
    """Yield load targets only for parameters that this rank updates: memory shrinks with the number of DP ranks."""
    by_parameter = {id(entry.data): entry for entry in nested_values(weights)}
    for part in chained_optimizers(optimizer):
        for shard in optimizer_shards(part):
            shape = shard.parameter.shape
            for name, local in shard.tensors.items():
                in_place = local.numel() == shape.numel() and local.dtype is torch.float32
                full = local.detach().view(shape) if in_place else torch.empty(shape)
                yield _LoadTarget(_state_entry(by_parameter[id(shard.parameter)], name, full), full, local, shard.start)


def _state_entry(weight: ShardedEntry, name: str, data: torch.Tensor) -> ShardedEntry:
    """Sharded entry of `data`, which has the weight's shape, split and named like the weight."""
    changes: dict[str, Any] = {"key": f"{STATE_PREFIX}{name}.{weight.key}", "data": data}
    if isinstance(weight, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(weight, **changes)


def _check_space(directory: Path, tensors: Sequence[ShardedTensor]) -> None:
    """Raise CheckpointError on all ranks when the disk has too little free space."""
    own_bytes = sum(
        tensor.data.numel() * tensor.data.itemsize for tensor in tensors if is_main_replica(tensor.replica_id)
    )
    reports = gather_objects((own_bytes, shutil.disk_usage(directory).free))
    needed, free = sum(size for size, _ in reports), reports[0][1]
    if needed > free:
        raise CheckpointError(
            f"{directory}: a checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room, then start again"
        )


def _check_fit(directory: Path, tensors: Sequence[ShardedTensor], *, with_state: bool) -> None:
    """Compare names and shapes of all ranks with the stored ones; every rank reaches the same result."""
    stored = _stored_shapes(directory)
    if not with_state:
        stored = {name: shape for name, shape in stored.items() if not name.startswith(STATE_PREFIX)}
    parts = gather_objects({tensor.key: tuple(tensor.global_shape) for tensor in tensors})
    own = {name: shape for part in parts for name, shape in part.items()}
    wrong = [name for name in stored.keys() | own.keys() if stored.get(name) != own.get(name)]
    wrong.sort(key=lambda name: (name.startswith(STATE_PREFIX), name))
    if not wrong:
        return
    lines = [
        f"  {name}: {_shape(own, name)} here, {_shape(stored, name)} in the checkpoint"
        for name in wrong[:SHOWN_MISMATCHES]
    ]
    if len(wrong) > SHOWN_MISMATCHES:
        lines.append(f"  and {len(wrong) - SHOWN_MISMATCHES} more")
    if wrong[0].startswith(STATE_PREFIX):
        what, remedy = "holds optimizer state of other trained parts", "train the same parts (model.trainable)"
    else:
        what, remedy = (
            "is of another model",
            "use the model section that it was made with (tools/convert.py inspect prints it)",
        )
    advice = (
        f"{remedy}, or start another run.directory from its weights with checkpoint.initialize_from"
        if with_state
        else remedy
    )
    raise CheckpointError("\n".join([f"{directory} {what}:", *lines, advice]))


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    described = torch_checkpoint.FileSystemReader(directory).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in described.items() if isinstance(entry, TensorStorageMetadata)}


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return f"shape {list(shapes[name])}" if name in shapes else "not there"

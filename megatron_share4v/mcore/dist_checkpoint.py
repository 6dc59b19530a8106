"""Weights and optimizer state of all ranks as global tensors on disk, through megatron-core's dist_checkpointing.

A tensor is stored under its global name, with its global shape, whatever the layout: weights as `<name>`, what AdamW keeps for a trained
weight as `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>`, always in fp32. Sharded and unsharded optimizers write the same tensors, so
a run may change over. Nothing of the optimizer's configuration is stored: learning rates and weight decay come from the run's own.
What directories mean, and which of them are whole, is checkpoint/'s business.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_share4v.errors import CheckpointError
from megatron_share4v.mcore.async_writer import CheckpointSnapshot, HostBuffers
from megatron_share4v.mcore.optimizer import (
    chained_optimizers,
    gather_updated_params,
    restore_step_counts,
    step_counts,
    unwrap_model,
)
from megatron_share4v.mcore.optimizer_gather import OptimizerStateGather
from megatron_share4v.parallel.collectives import gather_objects

STATE_PREFIX = "optimizer.state."
STATES = ("param", "exp_avg", "exp_avg_sq")
SHOWN_MISMATCHES = 5

ShardedEntry = ShardedTensor | ShardedTensorFactory


def take_snapshot(
    directory: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    sharding: dict[str, Any],
    buffers: HostBuffers | None,
) -> CheckpointSnapshot:
    """What this rank will write into the empty `directory` (on a file system that all ranks see). Collective.

    `sharding` is passed to the chunks' sharded_state_dict. With `buffers`, copied to the host: training may go on before it is written. Raises CheckpointError, on all ranks, when there is no room.
    """
    gather_updated_params(chunks)
    weights = named_weights(chunks, sharding)
    entries = _build_factories(nested_values(weights))
    live = [parameter for chunk in chunks for parameter in chunk.parameters()]
    gatherings: list[OptimizerStateGather] = []
    if optimizer is not None:
        entries += _build_factories(_saved_state(optimizer, weights, gatherings, buffers))
        live += [
            tensor
            for part in chained_optimizers(optimizer)
            for piece in optimizer_shards(part)
            for tensor in piece.tensors.values()
        ]
    _check_space(directory, entries)

    def fill(group: dist.ProcessGroup | None) -> None:
        for gathering in gatherings:
            gathering.complete(group)

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
    """Read weights, and with an optimizer its state, in place, at whatever layout they were written. Collective.

    `updates` becomes the step count of every trained parameter. Raises CheckpointError, on all ranks, when names or shapes differ.
    """
    weights = named_weights(chunks, sharding)
    entries = _build_factories(nested_values(weights))
    targets = [] if optimizer is None else list(_state_targets(optimizer, weights))
    entries += _build_factories(target.entry for target in targets)
    _check_fit(directory, entries, with_state=optimizer is not None)
    # A rank of a sharded optimizer asks for the parameters that it updates alone, so nobody covers everything.
    dist_checkpointing.load(_numbered(entries), str(directory), validate_access_integrity=False)
    for target in targets:
        target.copy_shard()
    if optimizer is not None:
        restore_step_counts(optimizer, updates)


def count_updates(optimizer: MegatronOptimizer) -> int:
    """Updates that the trained parameters, on whatever stage, have had. Collective."""
    counts = gather_objects(set(step_counts(optimizer)))
    different = set[int]().union(*counts)
    assert len(different) == 1, f"parameters had different numbers of updates: {sorted(different)}"
    return different.pop()


@dataclass(frozen=True)
class OptimizerShard:
    """What this rank keeps for one trained parameter: its fp32 weight and moments, by name, from flat position `start` on."""

    parameter: torch.nn.Parameter
    start: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _LoadTarget:
    """Where one tensor of optimizer state is read into: the `whole` parameter's, of which this rank keeps a piece from `start` on."""

    entry: ShardedEntry
    whole: torch.Tensor
    kept: torch.Tensor
    start: int

    @torch.no_grad()
    def copy_shard(self) -> None:
        """Copy the piece out, unless `whole` is a view of it and hence already there."""
        if self.whole.data_ptr() != self.kept.data_ptr():
            self.kept.view(-1).copy_(self.whole.view(-1)[self.start : self.start + self.kept.numel()])


def named_weights(chunks: Sequence[torch.nn.Module], sharding: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Core's layers also name objects that only Transformer Engine fills; those are left out."""
    found = {
        f"chunk{number}": unwrap_model(chunk).sharded_state_dict(metadata=dict(sharding))
        for number, chunk in enumerate(chunks)
    }
    return {
        chunk: {name: entry for name, entry in entries.items() if isinstance(entry, ShardedEntry)}
        for chunk, entries in found.items()
    }


def _build_factories(entries: Iterable[ShardedEntry]) -> list[ShardedTensor]:
    """Fused matrices as the parts that are stored; the parts are views, so what is read lands in place."""
    tensors = []
    for entry in entries:
        tensors += nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    return tensors


def _numbered(tensors: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _saved_state(
    optimizer: MegatronOptimizer,
    weights: dict[str, Any],
    gatherings: list[OptimizerStateGather],
    buffers: HostBuffers | None,
) -> Iterator[ShardedEntry]:
    """What a sharded optimizer's ranks hold in pieces is announced by the first of them, and there when the new one of `gatherings` is complete."""
    by_parameter = {id(entry.data): entry for entry in nested_values(weights)}
    for part in chained_optimizers(optimizer):
        if isinstance(part, DistributedOptimizer):
            kept = {id(piece.parameter): piece.tensors for piece in _sharded_pieces(part)}
            gatherings.append(
                OptimizerStateGather(part, kept, names=STATES, buffers=buffers, label=str(len(gatherings)))
            )
            for (parameter, name), whole in gatherings[-1].wholes.items():
                yield _state_entry(by_parameter[parameter], name, whole)
        else:
            for piece in _whole_pieces(part):
                for name, tensor in piece.tensors.items():
                    yield _state_entry(by_parameter[id(piece.parameter)], name, tensor.float())


def _state_targets(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> Iterator[_LoadTarget]:
    """Only of the parameters that this rank updates, so that the memory needed falls with the number of data-parallel ranks."""
    by_parameter = {id(entry.data): entry for entry in nested_values(weights)}
    for part in chained_optimizers(optimizer):
        for piece in optimizer_shards(part):
            shape = piece.parameter.shape
            for name, kept in piece.tensors.items():
                in_place = kept.numel() == shape.numel() and kept.dtype is torch.float32
                whole = kept.detach().view(shape) if in_place else torch.empty(shape)
                yield _LoadTarget(
                    _state_entry(by_parameter[id(piece.parameter)], name, whole), whole, kept, piece.start
                )


def optimizer_shards(part: MegatronOptimizer) -> Iterator[OptimizerShard]:
    """What one of core's optimizers keeps on this rank."""
    return _sharded_pieces(part) if isinstance(part, DistributedOptimizer) else _whole_pieces(part)


def _sharded_pieces(part: DistributedOptimizer) -> Iterator[OptimizerShard]:
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, position = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][position]
                    yield OptimizerShard(parameter, ranges["param"].start, _kept(part, main))


def _whole_pieces(part: MegatronOptimizer) -> Iterator[OptimizerShard]:
    if isinstance(part, Float16OptimizerWithFloat16Params):
        halves, mains = (chain.from_iterable(groups) for groups in (part.float16_groups, part.fp32_from_float16_groups))
        pairs = [*zip(halves, mains), *((main, main) for main in chain.from_iterable(part.fp32_from_fp32_groups))]
    else:
        pairs = [(main, main) for group in part.param_groups for main in group["params"]]
    for parameter, main in pairs:
        yield OptimizerShard(parameter, 0, _kept(part, main))


def _kept(part: MegatronOptimizer, main: torch.Tensor) -> dict[str, torch.Tensor]:
    state = part.optimizer.state[main]
    return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def _state_entry(weight: ShardedEntry, name: str, data: torch.Tensor) -> ShardedEntry:
    """`data`, of the weight's own shape, split and named like the weight."""
    changes: dict[str, Any] = {"key": f"{STATE_PREFIX}{name}.{weight.key}", "data": data}
    if isinstance(weight, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(weight, **changes)


def _check_space(directory: Path, tensors: Sequence[ShardedTensor]) -> None:
    """A full disk is better noticed before anything is written."""
    mine = sum(tensor.data.numel() * tensor.data.itemsize for tensor in tensors if is_main_replica(tensor.replica_id))
    reports = gather_objects((mine, shutil.disk_usage(directory).free))
    needed, free = sum(size for size, _ in reports), reports[0][1]
    if needed > free:
        raise CheckpointError(
            f"{directory}: a checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, then start again"
        )


def _check_fit(directory: Path, tensors: Sequence[ShardedTensor], *, with_state: bool) -> None:
    """Names and shapes of all ranks against the stored ones; every rank comes to the same verdict."""
    stored = _stored_shapes(directory)
    if not with_state:
        stored = {name: shape for name, shape in stored.items() if not name.startswith(STATE_PREFIX)}
    parts = gather_objects({tensor.key: tuple(tensor.global_shape) for tensor in tensors})
    here = {name: shape for part in parts for name, shape in part.items()}
    wrong = [name for name in stored.keys() | here.keys() if stored.get(name) != here.get(name)]
    wrong.sort(key=lambda name: (name.startswith(STATE_PREFIX), name))
    if not wrong:
        return
    lines = [
        f"  {name}: {_shape(here, name)} here, {_shape(stored, name)} in the checkpoint"
        for name in wrong[:SHOWN_MISMATCHES]
    ]
    if len(wrong) > SHOWN_MISMATCHES:
        lines.append(f"  and {len(wrong) - SHOWN_MISMATCHES} more")
    if wrong[0].startswith(STATE_PREFIX):
        what, remedy = "holds optimizer state of other trained parts", "train the same parts (model.trainable)"
    else:
        what, remedy = "is of another model", "use the model section that it was made with (in its manifest.json)"
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

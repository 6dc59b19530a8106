"""Training of the tiny model at any layout; its losses, norms, counts and weights, for tests that compare layouts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from tiny import LENGTH, MICRO_BATCH, micro_batches, step_items, tiny_family, with_tower
from tolerances import LAYOUT_LOSS, LAYOUT_NORM, LAYOUT_WEIGHT

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
from megatron_share4v.data.records import Batch

STEPS = 5


@dataclass(frozen=True)
class Variant:
    """One way to train the same model."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    sequence: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    dtype: str = "fp32"
    trainable: str = "half_tower"
    normalize: str = "tokens"
    ops: str = "auto"
    recompute: str = "none"
    gather: bool = False
    layout: str | tuple[int, ...] = "auto"
    family: str = "plain"
    tower: str = "clip"
    lengths: str = "equal"
    """`masked`: labels beyond a length of each micro-batch are dropped.

    `cropped`: so are all positions beyond it, which is equivalent.
    """


TRAINABLE = {
    "half_tower": {"vision_from_block": 1},
    "projector": {"language": False, "projector": True},
    "frozen_tower": {"language": True, "projector": True},
    "whole_tower": {"vision_from_block": -1},
}


@dataclass(frozen=True)
class Outcome:
    """Losses and gradient norms by step, model-wide parameter counts, and final global weights (rank 0 only)."""

    losses: list[float]
    norms: list[float]
    counts: dict[tuple[str, bool], int]
    weights: dict[str, torch.Tensor]


def train_variant(mesh, variant: Variant) -> Outcome:
    """Train five steps of AdamW from the same seed."""
    from megatron_share4v.config.training import OptimConfig, TrainConfig
    from megatron_share4v.mcore.backends import select_ops_backend
    from megatron_share4v.mcore.layer_config import DTYPES
    from megatron_share4v.mcore.layer_options import layer_options
    from megatron_share4v.mcore.optimizer import build_optimizer, unwrap_model, wrap_ddp
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.initialize import initialize_weights
    from megatron_share4v.model.trainable import parameter_counts
    from megatron_share4v.resilience.replica_checksum import check_replicas
    from megatron_share4v.train.data_feed import StepData
    from megatron_share4v.train.step import StepSettings, train_step

    model, dtype = tiny_family(variant.family, **TRAINABLE[variant.trainable]), DTYPES[variant.dtype]
    model = with_tower(model, variant.tower)
    parallel = _parallel_config(variant)
    ops = select_ops_backend(variant.ops, mesh=mesh).implementation
    recompute = variant.recompute
    settings = TrainConfig(
        global_batch_size=1, recompute=recompute, recompute_modules=("core_attn", "mlp"), recompute_tower=recompute
    )
    bare = build_chunks(
        model,
        mesh=mesh,
        parallel=parallel,
        dtype=dtype,
        ops=ops,
        options=layer_options(settings, variable_seq_lengths=variant.lengths == "cropped"),
    )
    initialize_weights(bare, seed=1, model=model)
    chunks = wrap_ddp(bare, mesh=mesh, parallel=parallel, bucket_elements=3000 if variant.gather else None)
    optim = OptimConfig(learning_rate=1e-3, projector_learning_rate=2e-3, weight_decay=0.1, clip_grad_norm=1.0)
    optimizer = build_optimizer(chunks, optim, parallel=parallel, dtype=dtype)
    outcome = Outcome([], [], parameter_counts(bare, mesh=mesh), {})
    for step in range(STEPS):
        batches = [
            _with_own_length(batch, number, variant.lengths)
            for number, batch in enumerate(micro_batches(step, image_size=model.vision.image_size))
        ]
        own_batches = [
            slice_for_context_parallel(
                batch, rank=mesh.coordinates.context, size=variant.context, sequence_length=batch.token_ids.size(1)
            )
            for batch in batches[mesh.coordinates.data :: mesh.layout.data]
        ]
        settings = StepSettings(
            mesh=mesh, micro_batch_size=MICRO_BATCH, normalize=variant.normalize, clip_grad_norm=1.0
        )
        data = StepData(step_items(step), own_batches, 0.0)
        result = train_step(chunks, optimizer, data, settings=settings, learning_rate_factor=1.0)
        assert not result.skipped
        assert result.trained_tokens == sum(batch.targets.numel() for batch in batches)
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
    check_replicas(chunks, mesh=mesh, step=STEPS)
    outcome.weights.update(global_weights([unwrap_model(chunk) for chunk in chunks]))
    return outcome


def _parallel_config(variant: Variant) -> ParallelConfig:
    return ParallelConfig(
        tensor=variant.tensor,
        pipeline=variant.pipeline,
        virtual=variant.virtual,
        context=variant.context,
        sequence=variant.sequence,
        distributed_optimizer=variant.distributed_optimizer,
        overlap_grad_reduce=variant.overlap,
        overlap_param_gather=variant.gather,
        layout=variant.layout,
    )


def _with_own_length(batch: Batch, number: int, lengths: str) -> Batch:
    """Give micro-batches the lengths 24, 12, 16, 20, 24, ..."""
    length = (LENGTH, 12, 16, 20)[number % 4]
    if lengths == "equal" or length == LENGTH:
        return batch
    kept = batch.target_rows % LENGTH < length
    rows, targets = batch.target_rows[kept], batch.targets[kept]
    if lengths == "masked":
        return replace(batch, target_rows=rows, targets=targets)
    ids, slots = (
        batch.token_ids[:, :length].contiguous(),
        batch.image_slots // LENGTH * length + batch.image_slots % LENGTH,
    )
    return replace(
        batch, token_ids=ids, image_slots=slots, target_rows=rows // LENGTH * length + rows % LENGTH, targets=targets
    )


def global_weights(chunks) -> dict[str, torch.Tensor]:
    """Gather all weights as global tensors on rank 0."""
    from megatron_share4v.model.initialize import iter_shards

    own_batches = [
        (s.key, s.global_shape, s.offset, s.data.detach().clone()) for s in iter_shards(chunks) if not s.replica
    ]
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own_batches, gathered)
    weights: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in itertools.chain.from_iterable(gathered or []):
        whole = weights.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        whole[tuple(slice(start, start + size) for start, size in zip(offset, data.shape))] = data
    return weights


def run_variants(groups: list[tuple[tuple[int, int, int, int], list[Variant]]]) -> list[tuple[Variant, Outcome]]:
    """Train all variants of this world size; each group shares one mesh."""
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    results = []
    for (tensor, pipeline, virtual, context), variants in groups:
        data = dist.get_world_size() // (tensor * pipeline * context)
        layout = Layout(tensor=tensor, pipeline=pipeline, virtual=virtual, context=context, data=data)
        with open_mesh(layout, device=Device("cpu")) as mesh:
            results += [(variant, train_variant(mesh, variant)) for variant in variants]
    return results if dist.get_rank() == 0 else []


def require_equal(variant: Variant, outcome: Outcome, expected: Outcome) -> dict[str, float]:
    """Compare an outcome with one rank's within the tolerances of layouts; return the largest differences."""
    assert outcome.counts == expected.counts, variant
    assert outcome.weights.keys() == expected.weights.keys()
    differences = {
        "loss": max(abs(a - b) for a, b in zip(outcome.losses, expected.losses)),
        "norm": max(abs(a - b) / b for a, b in zip(outcome.norms, expected.norms)),
        "weight": max(float((outcome.weights[key] - expected.weights[key]).abs().max()) for key in expected.weights),
    }
    limits = {"loss": LAYOUT_LOSS, "norm": LAYOUT_NORM, "weight": LAYOUT_WEIGHT}
    assert all(differences[name] <= limits[name] for name in limits), (variant, differences)
    return differences

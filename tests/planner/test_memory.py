"""Planned memory by class against real models, gradient buffers, optimizers and saved activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from tiny import LENGTH, MICRO_BATCH, micro_batches, tiny_family, with_tower

from megatron_share4v.config.model import ModelConfig, ProjectorConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.precision import PrecisionConfig
from megatron_share4v.config.training import TrainConfig
from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
from megatron_share4v.model.flops import WorkloadCounts
from megatron_share4v.model.pipeline_split import layers_per_stage
from megatron_share4v.planner.memory import (
    Fp8Settings,
    MemorySettings,
    RecomputeSettings,
    activations,
    make_chunk,
    model_state_memory,
)

if TYPE_CHECKING:
    from megatron_share4v.mcore.groups import Mesh

WITHIN = 0.05
"""Relative tolerance; the plan ignores scalars that layers keep beside their tensors."""


@dataclass(frozen=True)
class Case:
    """Layout, precision and recomputation of the tiny model."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    sequence: bool = False
    sharded: bool = True
    dtype: str = "bf16"
    trainable: tuple = (("vision_from_block", 1),)
    ops: str = "native"
    recompute: tuple = ()
    short: bool = False
    """Gradients and AdamW's moments are in bf16."""
    fp8: tuple = ()
    family: str = "plain"
    tower: str = "clip"
    feature_layer: int | tuple[int, ...] = -2
    projector: str = "mlp2x_gelu"

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(global_batch_size=1, **dict(self.recompute))

    @property
    def model(self) -> ModelConfig:
        """Tiny model; for FP8 its MLP divides over two ranks in multiples of 16."""
        model = with_tower(
            tiny_family(self.family, **dict(self.trainable)), self.tower, feature_layer=self.feature_layer
        )
        model = replace(model, projector=ProjectorConfig(type=self.projector))
        return replace(model, language=replace(model.language, intermediate_size=64)) if self.fp8 else model

    @property
    def precision(self) -> PrecisionConfig:
        return PrecisionConfig(dtype=self.dtype, **dict(self.fp8))


@dataclass(frozen=True)
class Measured:
    """Measured bytes on one rank; `activations` has one entry per chunk."""

    pipeline_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: list[int]
    images: int
    head_rows: int
    """Loss positions of the micro-batch on this rank."""


def storages(tensors) -> dict[int, int]:
    """Bytes by storage address: views count once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def kept_by_autograd(chunk, batch, *, width: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that one forward pass saves for backward, without weights and with the output sent to the next stage."""
    own, seen = storages(chunk.parameters()).keys(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.update(storages([tensor]))
        return tensor

    if not chunk.pipeline_stage.first:
        chunk.set_input_tensor(torch.randn(length, MICRO_BATCH, width, dtype=dtype, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = chunk(batch)
    if not chunk.pipeline_stage.last:
        seen.update(storages([output]))
    return sum(size for address, size in seen.items() if address not in own)


def build_case(case: Case, mesh: Mesh, parallel: ParallelConfig) -> tuple[list, list, object]:
    """Build the bare chunks, their DDP wrappers and the optimizer of a case as the trainer does."""
    from megatron_share4v.config.training import OptimConfig
    from megatron_share4v.mcore.backends import select_ops_backend
    from megatron_share4v.mcore.layer_config import DTYPES
    from megatron_share4v.mcore.layer_options import layer_options
    from megatron_share4v.mcore.optimizer import build_optimizer, wrap_ddp
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.initialize import initialize_weights

    model, dtype = case.model, DTYPES[case.dtype]
    options = layer_options(case.train, precision=case.precision)
    select_ops_backend(case.ops, mesh=mesh)
    bare = build_chunks(model, mesh=mesh, parallel=parallel, dtype=dtype, ops=case.ops, options=options)
    initialize_weights(bare, seed=1, model=model)
    short = "bf16" if case.short else "fp32"
    wrapped = wrap_ddp(bare, mesh=mesh, parallel=parallel, gradients=short)
    optimizer = build_optimizer(wrapped, OptimConfig(moments=short), parallel=parallel, dtype=dtype)
    return bare, wrapped, optimizer


def optimizer_bytes(optimizer: object, weights: dict[int, int]) -> int:
    """Bytes of the optimizer's parameters and state tensors that do not share storage with `weights`."""
    from megatron_share4v.mcore.optimizer import chained_optimizers

    states = [
        value
        for part in chained_optimizers(optimizer)
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for value in (parameter, *part.optimizer.state[parameter].values())
    ]
    return sum(
        tensor.nbytes for tensor in states if tensor.dim() and tensor.untyped_storage().data_ptr() not in weights
    )


def measure(cases: list[Case]) -> list[Measured]:
    """Build each case and measure its bytes on this rank."""
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.mcore.layer_config import DTYPES
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    results = []
    for case in cases:
        degrees = {name: getattr(case, name) for name in ("tensor", "pipeline", "virtual", "context")}
        layout = Layout(**degrees, data=dist.get_world_size() // (case.tensor * case.pipeline * case.context))
        parallel = ParallelConfig(**degrees, sequence=case.sequence, distributed_optimizer=case.sharded)
        with open_mesh(layout, device=Device("cpu")) as mesh:
            bare, wrapped, optimizer = build_case(case, mesh, parallel)
            weights = storages(parameter for chunk in bare for parameter in chunk.parameters())
            gradients = storages(buffer.grad_data for chunk in wrapped for buffer in chunk.buffers)
            optimizer_size = optimizer_bytes(optimizer, weights)
            length = LENGTH // case.context // (case.tensor if case.sequence else 1)
            batch = slice_for_context_parallel(
                micro_batches(0, image_size=case.model.vision.image_size)[3],
                rank=mesh.coordinates.context,
                size=case.context,
                sequence_length=LENGTH,
            )
            shape = dict(width=case.model.language.hidden_size, length=length, dtype=DTYPES[case.dtype])
            results.append(
                Measured(
                    pipeline_rank=mesh.coordinates.pipeline,
                    weights=sum(weights.values()),
                    gradients=sum(gradients.values()),
                    optimizer=optimizer_size,
                    activations=[kept_by_autograd(chunk, batch, **shape) for chunk in bare],
                    images=batch.pixels.size(0),
                    head_rows=batch.targets.numel(),
                )
            )
    return results


STAGE_2, PROJECTOR, ALL = (
    (("language", True),),
    (("language", False), ("projector", True)),
    (("vision_from_block", -1),),
)
FULL, SOME = (("recompute", "full"), ("recompute_tower", "full")), (("recompute", "full"), ("recompute_layers", 2))
ATTENTION, MLP = (
    (("recompute", "selective"), ("recompute_tower", "selective"), ("recompute_modules", modules))
    for modules in (("core_attn",), ("core_attn", "mlp"))
)
FP8 = (("fp8", "tensorwise"),)
PRECISE, ENDS, TOWER = (
    (*FP8, (name, value))
    for name, value in (("fp8_weight_gradient", "dtype"), ("fp8_first_layers", 3), ("fp8_tower", True))
)
CASES = {
    1: [Case(), Case(dtype="fp32"), Case(trainable=STAGE_2), Case(trainable=PROJECTOR),
        Case(trainable=ALL, sharded=False), Case(ops="reference", dtype="fp32"),
        Case(fp8=FP8), Case(fp8=PRECISE), Case(fp8=ENDS), Case(fp8=TOWER, trainable=ALL),
        Case(fp8=FP8, trainable=PROJECTOR), Case(fp8=FP8, recompute=SOME), Case(fp8=TOWER, recompute=ATTENTION),
        Case(fp8=TOWER, recompute=MLP), Case(fp8=FP8, ops="reference", dtype="fp32"),
        Case(recompute=FULL, trainable=ALL), Case(recompute=SOME), Case(recompute=ATTENTION, trainable=ALL),
        Case(recompute=MLP), Case(family="tied"), Case(family="qk_norm"), Case(family="biased"), Case(family="all"),
        Case(family="all", recompute=ATTENTION), Case(family="qk_norm", fp8=FP8, trainable=PROJECTOR),
        Case(tower="siglip", trainable=ALL), Case(tower="dinov2", trainable=ALL),
        Case(tower="dinov2", trainable=ALL, recompute=MLP, dtype="fp32"),
        Case(tower="dinov2", ops="reference", dtype="fp32"),
        Case(tower="siglip", feature_layer=(-1, 0, -2), projector="mlp3x_gelu"),
        Case(tower="dinov2", fp8=TOWER, trainable=ALL), Case(projector="mlp1x_gelu")],
    2: [Case(tensor=2, recompute=ATTENTION), Case(tensor=2, short=True), Case(short=True),
        Case(tensor=2, sequence=True), Case(), Case(sharded=False), Case(pipeline=2),
        Case(pipeline=2, virtual=2, dtype="fp32"), Case(context=2), Case(context=2, recompute=ATTENTION),
        Case(tensor=2, sequence=True, fp8=FP8), Case(tensor=2, fp8=FP8), Case(pipeline=2, fp8=ENDS),
        Case(context=2, fp8=FP8), Case(context=2, fp8=FP8, recompute=ATTENTION),
        Case(tensor=2, sequence=True, family="all"), Case(pipeline=2, family="tied"),
        Case(pipeline=2, family="all", sharded=False), Case(context=2, family="qk_norm"),
        Case(tensor=2, tower="dinov2", trainable=ALL), Case(tensor=2, projector="mlp4x_gelu", tower="siglip")],
    4: [Case(tensor=2, pipeline=2, sequence=True), Case(pipeline=2, trainable=STAGE_2),
        Case(tensor=2, trainable=ALL), Case(pipeline=4), Case(tensor=2, context=2, sequence=True)],
}  # fmt: skip


def recomputed(train: TrainConfig) -> RecomputeSettings:
    return RecomputeSettings(train.recompute, train.recompute_layers, train.recompute_tower, train.recompute_modules)


@pytest.mark.parametrize("world", CASES)
def test_planned_bytes_match_measured_bytes(world: int, native_ops: None) -> None:
    measured = run_world(world, measure, CASES[world])
    worst = 0.0
    for number, case in enumerate(CASES[world]):
        model = case.model
        counts = layers_per_stage(model, ParallelConfig(pipeline=case.pipeline, virtual=case.virtual))
        settings = MemorySettings(
            tensor=case.tensor,
            context=case.context,
            sequence=case.sequence,
            element=2 if case.dtype == "bf16" else 4,
            native=case.ops == "native",
            recompute=recomputed(case.train),
            fp8=Fp8Settings(precise=case.precision.fp8_weight_gradient == "dtype", tower=case.precision.fp8_tower),
        )
        replicas = world // (case.tensor * case.pipeline)
        positions = MICRO_BATCH * LENGTH // case.context
        for rank in range(case.pipeline):
            in_fp8 = case.precision.fp8_layers(model.language.num_layers)
            chunks = [make_chunk(stage, counts, fp8=in_fp8) for stage in range(rank, len(counts), case.pipeline)]
            short = {"gradient": 2, "moments": 4} if case.short else {}
            planned = model_state_memory(model, chunks, settings, data=replicas, sharded=case.sharded, **short)
            mine = [ranks[number] for ranks in measured if ranks[number].pipeline_rank == rank]
            assert len(mine) == case.tensor * replicas
            for real in mine:
                assert planned.weights == pytest.approx(real.weights, rel=WITHIN), (case, rank)
                assert planned.gradients == pytest.approx(real.gradients, rel=WITHIN), (case, rank)
                amounts = WorkloadCounts(positions=positions, squares=0, images=real.images, head_rows=real.head_rows)
                for chunk, bytes_kept in zip(chunks, real.activations, strict=True):
                    expected = activations(model, chunk, amounts, settings, sequences=MICRO_BATCH)
                    if case.ops == "reference":
                        # torch's RMSNorm on the CPU is a composite and also saves the normalised input.
                        norms = 2 * chunk.layers + chunk.last
                        expected += norms * positions * model.language.hidden_size * settings.element
                    worst = max(worst, abs(expected / bytes_kept - 1))
                    assert expected == pytest.approx(bytes_kept, rel=WITHIN), (case, rank, chunk)
            # Shard boundaries fall inside weights, so only the sum over ranks is comparable.
            assert planned.optimizer * len(mine) == pytest.approx(sum(real.optimizer for real in mine), rel=WITHIN), (
                case,
                rank,
            )
    print(f"\n{world} ranks: activations off by {worst:.2%} at most")

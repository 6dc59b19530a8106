"""A training step makes one host sync, for loss, control flags and gradient norm together, and none after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from sync_detector import detect_host_syncs


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of a training step."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    ops: str = "native"
    packed: bool = False
    attention: str = "sdpa"
    train: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    trainable: dict[str, Any] = field(default_factory=lambda: {"vision_from_block": 1})
    normalize: str = "tokens"


SINGLE_RANK = [
    Case(),
    Case(packed=True),
    Case(packed=True, ops="reference"),
    Case(packed=True, attention="math"),
    Case(ops="reference", dtype="fp32", normalize="microbatch"),
    Case(trainable={"language": False, "projector": True}),
    Case(trainable={"vision_from_block": -1}, parallel={"distributed_optimizer": False}),
    Case(train={"recompute": "full", "recompute_tower": "full"}),
    Case(train={"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}),
    Case(precision={"fp8": "tensorwise"}),
    Case(precision={"fp8": "tensorwise", "fp8_weight_gradient": "dtype"}, ops="reference"),
    Case(optim={"moments": "bf16"}, precision={"gradients": "bf16"}),
    Case(optim={"offload": True}),
]
TWO_RANKS = [
    Case(tensor=2, parallel={"sequence": True}, packed=True),
    Case(tensor=2, ops="reference"),
    Case(parallel={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    Case(pipeline=2),
    Case(pipeline=2, virtual=2, packed=True),
    Case(context=2, packed=True),
]


def find_host_syncs(cases: list[Case]) -> list[list[str]]:
    """Return the host syncs of the second step of each case; the first step fills caches."""
    from megatron_share4v.mcore.backends import select_ops_backend
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    results = []
    for case in cases:
        degrees = {"tensor": case.tensor, "context": case.context, "pipeline": case.pipeline}
        layout = Layout(
            **degrees, virtual=case.virtual, data=dist.get_world_size() // (case.tensor * case.context * case.pipeline)
        )
        with open_mesh(layout, device=Device("cpu")) as mesh:
            select_ops_backend(case.ops, mesh=mesh)
            results.append(find_in_second_step(mesh, case))
    return results


def find_in_second_step(mesh: Any, case: Case) -> list[str]:
    """Train two steps and return the host syncs of the second."""
    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.config.run import PrecisionConfig
    from megatron_share4v.config.training import OptimConfig, TrainConfig
    from megatron_share4v.mcore.layer_config import DTYPES
    from megatron_share4v.mcore.layer_options import layer_options
    from megatron_share4v.mcore.optimizer import build_optimizer, chained_optimizers, wrap_ddp
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.initialize import initialize_weights
    from megatron_share4v.ops.adamw_optimizer import FusedAdamW
    from megatron_share4v.train.step import StepSettings, train_step

    data, model, sequences = step_data(mesh, packed=case.packed, trainable=case.trainable)
    parallel = ParallelConfig(
        tensor=case.tensor, context=case.context, pipeline=case.pipeline, virtual=case.virtual, **case.parallel
    )
    precision = PrecisionConfig(dtype=case.dtype, **case.precision)
    options = layer_options(
        TrainConfig(global_batch_size=1, **case.train), precision=precision, attention=case.attention
    )
    dtype = DTYPES[case.dtype]
    bare = build_chunks(model, mesh=mesh, parallel=parallel, dtype=dtype, ops=case.ops, options=options)
    initialize_weights(bare, seed=1, model=model)
    chunks = wrap_ddp(bare, mesh=mesh, parallel=parallel, gradients=precision.gradients)
    optimizer = build_optimizer(chunks, OptimConfig(learning_rate=1e-3, **case.optim), parallel=parallel, dtype=dtype)
    settings = StepSettings(
        mesh=mesh,
        micro_batch_size=sequences,
        normalize=case.normalize,
        clip_grad_norm=1e-3,
        control_flags=lambda: (1.0, 2.0),
    )
    first = train_step(chunks, optimizer, data, settings=settings, learning_rate_factor=1.0)
    fused = [part.optimizer for part in chained_optimizers(optimizer) if isinstance(part.optimizer, FusedAdamW)]
    with detect_host_syncs(host=[state["step"] for one in fused for state in one.state.values()]) as syncs:
        result = train_step(chunks, optimizer, data, settings=settings, learning_rate_factor=1.0)
    world = dist.get_world_size()
    assert (
        not result.skipped
        and result.loss != first.loss
        and result.control_flags == (world, 2.0 * world)
        and result.grad_norm > 1e-3
    )
    return syncs.found


def step_data(mesh: Any, *, packed: bool, trainable: dict[str, Any]) -> tuple[Any, Any, int]:
    """Return (micro-batches of this rank, with and without images; model; sequences of a micro-batch)."""
    from dataclasses import replace

    import numpy as np
    import tiny

    from megatron_share4v.data.loading.collate import StageRole, collate
    from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
    from megatron_share4v.data.records import Example
    from megatron_share4v.data.sampling.sampler import GlobalBatch
    from megatron_share4v.train.data_feed import StepData

    model = tiny.tiny_model(**trainable)
    language = replace(model.language, num_layers=4, hidden_size=64, intermediate_size=128)
    model = replace(model, language=language)
    if not packed:
        return (
            StepData(tiny.step_items(0), tiny.micro_batches(0)[mesh.coordinates.data :: mesh.layout.data], 0.0),
            model,
            tiny.MICRO_BATCH,
        )
    generator, batches = torch.Generator().manual_seed(0), []
    for number in range(4):
        segments, examples = ((20, 9, 15), (30, 18)), []
        for length in (length for row in segments for length in row):
            images = int(number != 2)
            ids = torch.randint(1, 100, (length - 3 * images,), generator=generator)
            pixels = torch.randint(0, 256, (images, 16, 16, 3), generator=generator, dtype=torch.uint8)
            ids[1 : 1 + images] = -200
            labels = torch.where(torch.arange(len(ids)) < 4, -100, ids)
            examples.append(Example(key="", name="", input_ids=ids, labels=labels, pixels=pixels))
        batches.append(
            collate(
                examples,
                sequence_length=48,
                segments=segments,
                tokens_per_image=tiny.PATCHES,
                role=StageRole(first=True, last=True),
            )
        )
    items = GlobalBatch(0, np.arange(20), np.full(20, 9), 48, 0, 0)
    place = {"rank": mesh.coordinates.context, "size": mesh.layout.context, "sequence_length": 48}
    batches = [slice_for_context_parallel(batch, **place) for batch in batches]
    return StepData(items, batches[mesh.coordinates.data :: mesh.layout.data], 0.0), model, 2


@pytest.mark.parametrize(("world", "cases"), [(1, SINGLE_RANK), (2, TWO_RANKS)])
def test_step_has_one_host_sync(world: int, cases: list[Case], native_ops: None) -> None:
    for rank, results in enumerate(run_world(world, find_host_syncs, cases)):
        for case, found in zip(cases, results, strict=True):
            assert (
                len(found) == 1 and found[0].startswith("megatron_share4v.train.step:") and found[0].endswith(" tolist")
            ), (rank, case, found)


@pytest.mark.parametrize(
    ("what", "does"),
    [
        ("item", lambda x: x.sum().item()),
        ("tolist", lambda x: x.tolist()),
        ("__float__", lambda x: float(x[0])),
        ("__bool__", lambda x: bool(x[0] > 0)),
        ("cpu", lambda x: x.cpu()),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("masked_select", lambda x: x.masked_select(x > 0)),
        ("index_put", lambda x: x.index_put((x > 0,), x[:3])),
        ("_unique2", lambda x: x.unique()),
        ("tensor with a device", lambda x: torch.tensor([1.0], device=x.device)),
        ("tensor of tensors", lambda x: torch.tensor([x.amin(), x.amax()])),
        ("copy to the device", lambda x: torch.arange(3).to(x.device, non_blocking=True)),
        ("of the host and of the device", lambda x: x + torch.arange(3)),
        ("of the host and of the device", lambda x: x[torch.tensor([0, 1])]),
        ("torch.cuda.synchronize", lambda x: torch.cuda.synchronize()),
        ("_local_scalar_dense", lambda x: ReadsInBackward.apply(x.requires_grad_()).sum().backward()),
    ],
)
def test_host_syncs_are_found(what: str, does: Any) -> None:
    x = torch.arange(1.0, 4.0)
    with detect_host_syncs() as syncs:
        does(x)
    assert any(what in found for found in syncs.found), syncs.found


class ReadsInBackward(torch.autograd.Function):
    """A function whose backward pass reads a value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * grad.sum().item()


def test_work_without_host_sync_is_not_reported() -> None:
    from megatron_share4v.parallel.device import to_device_async

    x = torch.arange(1.0, 4.0)
    with detect_host_syncs() as syncs:
        known = torch.tensor([0, 2])
        assert known.tolist() == [0, 2] and int(known.sum()) == 2
        picked = x[to_device_async(known, x.device)] * torch.zeros(2, device=x.device) + torch.tensor(3)
        picked[picked > 0] = 1.0
        x.masked_fill_(x > 1, 0.0)
    assert not syncs.found, syncs.found

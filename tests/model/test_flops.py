"""Closed-form FLOPs against torch.utils.flop_counter on the real model, with every freezing choice, and packed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import LENGTH, MICRO_BATCH, micro_batches, tiny_family, tiny_model, with_tower
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.model import ModelConfig, ProjectorConfig, TrainableConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.run import RunConfig, RunSection
from megatron_share4v.config.training import TrainConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_options import LayerOptions, layer_options
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.flops import ExecutionOptions, WorkloadCounts, flops_by_part
from megatron_share4v.model.initialize import initialize_weights

WITHIN = 0.005
"""Core computes the gradient of the projector's input also where it is unused, and a frozen matrix's products are
batched ones, which the counter takes for attention.
"""
PLAIN = ExecutionOptions(flash=False)
"""Attention that keeps its scores; the head computes its logits again in the backward pass."""
TRAINABLE = {
    "stage 1": {"vision_from_block": 1},
    "stage 2": {},
    "projector": {"language": False},
    "projector and tower": {"language": False, "vision_from_block": -1},
    "everything": {"vision_from_block": -1},
    "language": {"projector": False},
    "tower": {"projector": False, "language": False, "vision_from_block": 1},
}


def counted(
    model: ModelConfig,
    batch,
    *,
    mesh: Mesh,
    ops: str,
    dtype: torch.dtype = torch.float32,
    options: LayerOptions = LayerOptions(),
) -> tuple[float, float]:
    """Return (weight products, attention products) of one forward and backward pass with plain attention."""
    [chunk] = build_chunks(model, mesh=mesh, parallel=ParallelConfig(), dtype=dtype, ops=ops, options=options)
    initialize_weights([chunk], seed=1, model=model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        chunk(batch).backward()
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = by_op.pop("aten.bmm")
    return sum(by_op.values()), attention


def computed(
    model: ModelConfig, amounts: WorkloadCounts, execution: ExecutionOptions | None = None
) -> tuple[float, float]:
    """Return the same two from the formulas.

    The counter counts the whole square of causal attention, of which half is needed.
    """
    of = flops_by_part(model, amounts, execution)
    layers = of.layer * model.language.num_layers
    whole = of.tower + of.projector + layers + of.head
    seen = whole.attention_forward + whole.attention_backward + layers.attention_forward + layers.attention_backward
    return whole.forward + whole.backward, seen


def without_padded_rows(model: ModelConfig) -> ModelConfig:
    """Model whose vocabulary fills its head, without padded rows."""
    return dataclasses.replace(
        model, language=dataclasses.replace(model.language, vocab_size=model.language.padded_vocab_size)
    )


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_unpacked(trainable: str, mesh: Mesh) -> None:
    """Two full sequences with an image each: without padding, only the head's second logits are beyond the model's."""
    model = without_padded_rows(dataclasses.replace(tiny_model(), trainable=TrainableConfig(**TRAINABLE[trainable])))
    batch = micro_batches(0)[0]
    amounts = WorkloadCounts(
        positions=MICRO_BATCH * LENGTH, squares=MICRO_BATCH * LENGTH**2, images=2, head_rows=batch.targets.numel()
    )
    expected = computed(model, amounts, PLAIN)
    assert counted(model, batch, mesh=mesh, ops="reference") == pytest.approx(expected, rel=WITHIN)
    matrices, attention = computed(model, amounts)
    assert expected == (matrices + flops_by_part(model, amounts).head.forward, attention)


def test_own_head_width_and_tied_head(mesh: Mesh) -> None:
    """Heads wider than hidden_size / heads; norms, biases and rotation are no matrix products."""
    model, batch = without_padded_rows(tiny_family("all")), micro_batches(0)[0]
    amounts = WorkloadCounts(
        positions=MICRO_BATCH * LENGTH, squares=MICRO_BATCH * LENGTH**2, images=2, head_rows=batch.targets.numel()
    )
    expected = computed(model, amounts, PLAIN)
    assert counted(model, batch, mesh=mesh, ops="reference") == pytest.approx(expected, rel=WITHIN)


def test_linear_projector(mesh: Mesh) -> None:
    model = without_padded_rows(
        dataclasses.replace(tiny_model(vision_from_block=-1), projector=ProjectorConfig(type="linear"))
    )
    batch = micro_batches(0)[3]
    amounts = WorkloadCounts(
        positions=MICRO_BATCH * LENGTH, squares=MICRO_BATCH * LENGTH**2, images=2, head_rows=batch.targets.numel()
    )
    expected = computed(model, amounts, PLAIN)
    assert counted(model, batch, mesh=mesh, ops="reference") == pytest.approx(expected, rel=WITHIN)
    matrices, attention = computed(model, amounts)
    assert expected == (matrices + flops_by_part(model, amounts).head.forward, attention)


@pytest.mark.parametrize(
    ("family", "feature_layer", "projector"),
    [("siglip", -1, "mlp3x_gelu"), ("siglip", (-2, -1), "mlp1x_gelu"), ("dinov2", (1, 3), "mlp2x_gelu")],
)
def test_towers_and_projectors(family: str, feature_layer: int | tuple[int, ...], projector: str, mesh: Mesh) -> None:
    model = with_tower(tiny_model(vision_from_block=-1), family, feature_layer=feature_layer)
    model = without_padded_rows(dataclasses.replace(model, projector=ProjectorConfig(type=projector)))
    batch = micro_batches(0, image_size=model.vision.image_size)[0]
    amounts = WorkloadCounts(
        positions=MICRO_BATCH * LENGTH, squares=MICRO_BATCH * LENGTH**2, images=2, head_rows=batch.targets.numel()
    )
    assert counted(model, batch, mesh=mesh, ops="reference") == pytest.approx(computed(model, amounts), rel=WITHIN)


def test_packed_with_padding(mesh: Mesh) -> None:
    """Attention covers each sample of a pack, and the padding at its end, separately."""
    model, segments = tiny_model(), ((10, 9), (17, 3))
    batch = dataclasses.replace(micro_batches(0)[0], segments=segments)
    pieces = np.array([10, 9, 5, 17, 3, 4])
    done = WorkloadCounts(
        positions=2 * LENGTH, squares=int((pieces**2).sum()), images=2, head_rows=batch.targets.numel()
    )
    assert counted(model, batch, mesh=mesh, ops="reference") == pytest.approx(computed(model, done, PLAIN), rel=WITHIN)


def test_native_head_computes_its_logits_twice(mesh: Mesh, native_ops: None) -> None:
    model, batch = tiny_model(), micro_batches(0)[0]
    done = WorkloadCounts(
        positions=MICRO_BATCH * LENGTH, squares=MICRO_BATCH * LENGTH**2, images=2, head_rows=batch.targets.numel()
    )
    for dtype in (torch.float32, torch.bfloat16):
        matrices, _ = counted(model, batch, mesh=mesh, ops="native", dtype=dtype)
        assert matrices == computed(model, done, PLAIN)[0]
        assert matrices > computed(model, done, ExecutionOptions(fused_head=False, flash=False))[0]


RECOMPUTED = {
    "full": TrainConfig(global_batch_size=1, recompute="full"),
    "some layers": TrainConfig(global_batch_size=1, recompute="full", recompute_layers=3),
    "attention": TrainConfig(global_batch_size=1, recompute="selective", recompute_modules=("core_attn",)),
    "mlp": TrainConfig(
        global_batch_size=1, recompute="selective", recompute_tower="selective", recompute_modules=("mlp", "core_attn")
    ),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation(name: str, mesh: Mesh) -> None:
    """FLOPs that core recomputes are counted twice."""
    model, batch, train = tiny_model(), micro_batches(0)[0], RECOMPUTED[name]
    data = DataConfig(train="data", tokenizer="tokenizer.model", max_text_length=20)
    config = RunConfig(run=RunSection(directory="none"), data=data, model=model, train=train)
    execution = dataclasses.replace(
        ExecutionOptions.of(config, layers_per_stage=(model.language.num_layers,)), flash=False
    )
    done = WorkloadCounts(
        positions=MICRO_BATCH * LENGTH, squares=MICRO_BATCH * LENGTH**2, images=2, head_rows=batch.targets.numel()
    )
    expected = computed(model, done, execution)
    assert counted(model, batch, mesh=mesh, ops="reference", options=layer_options(train)) == pytest.approx(
        expected, rel=WITHIN
    )
    plain = computed(model, done, PLAIN)
    assert sum(expected) > 1.02 * sum(plain)

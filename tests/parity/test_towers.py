"""Towers of every family against transformers' CLIPVisionModel, SiglipVisionModel and Dinov2Model.

Features of several layers and the gradients of all weights, in this process and at TP 2; and deep projectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from tolerances import FP32_MODULE
from torch import nn

from megatron_share4v.checkpoint.hf.weight_map import CLIP_IN_MEMORY, SHARE4V, to_megatron
from megatron_share4v.config.model import LanguageConfig, ModelConfig, ProjectorConfig, TrainableConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.training import TrainConfig
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.layer_options import layer_options
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import fill_parameters, initial_value, iter_shards
from megatron_share4v.ops.op import Implementation
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout

LANGUAGE = LanguageConfig(
    vocab_size=50, hidden_size=32, intermediate_size=40, num_layers=2, num_attention_heads=4, num_key_value_heads=2
)
CLIP = VisionConfig(
    image_size=24, patch_size=8, hidden_size=32, intermediate_size=48, num_layers=3, num_attention_heads=2
)
# 30 / 8: the last 6 pixels right and below are not seen.
SIGLIP = replace(
    CLIP, model_type="siglip_vision_model", image_size=30, class_token=False, feature_select="full", patch_bias=True,
    pre_norm=False, activation="gelu_tanh", layer_norm_eps=1e-6, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
)  # fmt: skip
DINOV2 = replace(
    CLIP, model_type="dinov2", patch_bias=True, pre_norm=False, layer_scale=True, activation="gelu",
    layer_norm_eps=1e-6, intermediate_size=128,
)  # fmt: skip
TOWERS = {"clip": CLIP, "siglip": SIGLIP, "dinov2": DINOV2}
LAYERS = [-2, -1, 0, (-2, 1, 3)]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Make this process the only rank of a world."""
    with process_group(World.single_process(), Device("cpu"), timeout_s=60):
        yield


def hf_tower(vision: VisionConfig) -> nn.Module:
    """Build transformers' tower of these sizes with random weights, biases and norms included."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    sizes: dict[str, Any] = {
        "hidden_size": vision.hidden_size, "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads, "image_size": vision.image_size,
        "patch_size": vision.patch_size, "layer_norm_eps": vision.layer_norm_eps,
    }  # fmt: skip
    torch.manual_seed(3)
    if vision.model_type == "dinov2":
        tower: nn.Module = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=vision.intermediate_size // vision.hidden_size))
    elif vision.model_type == "siglip_vision_model":
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=vision.intermediate_size))
    else:
        tower = CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=vision.intermediate_size))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return tower.eval()


def hf_features(tower: nn.Module, vision: VisionConfig, pixels: torch.Tensor) -> torch.Tensor:
    """Compute features as LlavaForConditionalGeneration selects them, [N, F, L * V]."""
    hidden = tower(normalise(pixels, dtype=torch.float32, vision=vision), output_hidden_states=True).hidden_states
    layers = vision.feature_layer if isinstance(vision.feature_layer, tuple) else (vision.feature_layer,)
    joined = torch.cat([hidden[layer] for layer in layers], dim=-1)
    return joined[:, 1:] if vision.feature_select == "default" else joined


def random_pixels(vision: VisionConfig, *, images: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, *[vision.image_size] * 2, 3), dtype=torch.uint8, generator=generator)


def build_chunk(model: ModelConfig, weights: dict[str, torch.Tensor], *, mesh: Mesh, ops: Implementation, **train: Any):
    """Build this rank's chunk with `weights`, and initial values for the rest. `train`: fields of TrainConfig."""
    [chunk] = build_chunks(
        model,
        mesh=mesh,
        parallel=ParallelConfig(tensor=mesh.layout.tensor),
        dtype=torch.float32,
        ops=ops,
        options=layer_options(TrainConfig(global_batch_size=1, **train)),
    )
    fill_parameters(
        [chunk],
        lambda name, shape: weights[name] if name in weights else initial_value(name, shape, seed=0, model=model),
    )
    return chunk


def open_tensor_mesh() -> AbstractContextManager[Mesh]:
    """Open a mesh in which all ranks of the world are tensor-parallel."""
    size = dist.get_world_size()
    return open_mesh(Layout.for_world(ParallelConfig(tensor=size), world_size=size), device=Device("cpu"))


def features_and_gradients(
    vision: VisionConfig,
    weights: dict[str, torch.Tensor],
    slope: torch.Tensor,
    train: dict[str, Any],
    ops: Implementation = "reference",
    first_block: int = -1,
) -> tuple[torch.Tensor, list[tuple[str, tuple[int, ...], torch.Tensor]]]:
    """Return [F, N, L * V] features and (name, offset, gradient) of every shard of the tower on this rank."""
    model = ModelConfig(vision=vision, language=LANGUAGE, trainable=TrainableConfig(vision_from_block=first_block))
    with open_tensor_mesh() as mesh:
        chunk = build_chunk(model, weights, mesh=mesh, ops=ops, **train)
        features = chunk.vision(random_pixels(vision))
        features.backward(slope.transpose(0, 1))
        gradients = {
            parameter.data_ptr(): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in chunk.parameters()
        }
        shards = [
            (shard.key, shard.offset, gradients[shard.data.data_ptr()].view(shard.data.shape))
            for shard in iter_shards([chunk])
            if shard.key.startswith("vision")
        ]
        return features.detach(), shards


def reference(vision: VisionConfig) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, dict]:
    """Return our weights, transformers' features, the gradient of the features, and our names' gradients."""
    tower, model = hf_tower(vision), ModelConfig(vision=vision, language=LANGUAGE)

    def mapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return to_megatron(tensors, model, naming=CLIP_IN_MEMORY, components=("vision",))

    expected = hf_features(tower, vision, random_pixels(vision))
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(slope)
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in tower.named_parameters()
    }
    weights = {name: tensor.clone() for name, tensor in mapped(tower.state_dict()).items()}
    return weights, expected.detach(), slope, mapped(gradients)


def assert_equal(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    scale = expected.abs().max().clamp(min=1e-3)
    assert got.shape == expected.shape and (got - expected).abs().max() / scale <= FP32_MODULE, what


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("family", TOWERS)
def test_features_and_gradients_equal_transformers(
    family: str, layer: int | tuple[int, ...], one_rank: None, native_ops: None
) -> None:
    vision = replace(TOWERS[family], feature_layer=layer)
    weights, expected, slope, wanted = reference(vision)
    assert expected.shape[1:] == (vision.num_features, vision.feature_width) == (9, vision.feature_width)
    ops = "native" if layer in (-2, 0) else "reference"
    features, gradients = features_and_gradients(vision, weights, slope, {}, ops)
    assert_equal(features.transpose(0, 1), expected, "features")
    assert {name for name, _, _ in gradients} == set(wanted)
    for name, _, gradient in gradients:
        assert_equal(gradient, wanted[name], name)


def test_layers_of_a_frozen_prefix_are_selected_too(one_rank: None) -> None:
    vision = replace(DINOV2, feature_layer=(1, -1, 0))
    weights, expected, slope, wanted = reference(vision)
    features, gradients = features_and_gradients(vision, weights, slope, {}, first_block=2)
    assert_equal(features.transpose(0, 1), expected, "features")
    for name, _, gradient in gradients:
        trains = name.startswith("vision.layers.2.")
        assert_equal(gradient, wanted[name] if trains else torch.zeros_like(gradient), name)


def test_full_selection_keeps_the_class_token(one_rank: None) -> None:
    vision = replace(DINOV2, feature_select="full", feature_layer=(-2, -1))
    weights, expected, slope, wanted = reference(vision)
    features, gradients = features_and_gradients(vision, weights, slope, {})
    assert features.shape[0] == vision.num_features == vision.num_patches + 1
    assert_equal(features.transpose(0, 1), expected, "features")
    for name, _, gradient in gradients:
        assert_equal(gradient, wanted[name], name)


@pytest.mark.parametrize("family", TOWERS)
def test_tensor_parallel_gradients_equal_transformers(family: str) -> None:
    """Replicated weights, layer scales among them, have the same gradient on both ranks."""
    vision = TOWERS[family]
    weights, expected, slope, wanted = reference(vision)
    for features, gradients in run_world(2, features_and_gradients, vision, weights, slope, {}):
        assert_equal(features.transpose(0, 1), expected, "features")
        for name, offset, gradient in gradients:
            part = tuple(slice(start, start + size) for start, size in zip(offset, gradient.shape))
            assert_equal(gradient, wanted[name][part], name)


@pytest.mark.parametrize(
    "train",
    [{"recompute_tower": "full"}, {"recompute_tower": "selective", "recompute_modules": ("core_attn", "mlp")}],
    ids=["full", "selective"],
)
def test_recomputation_keeps_the_gradients(train: dict[str, Any], one_rank: None) -> None:
    vision = replace(DINOV2, feature_layer=(1, -2))
    weights, _, slope, _ = reference(vision)
    (features, plain), (again, recomputed) = (
        features_and_gradients(vision, weights, slope, choices) for choices in ({}, train)
    )
    assert torch.equal(features, again)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(plain, recomputed, strict=True))


def project(model: ModelConfig, weights: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    with open_tensor_mesh() as mesh:
        chunk = build_chunk(model, weights, mesh=mesh, ops="reference")
        return chunk.projector(features).detach()


@pytest.mark.parametrize(("depth", "tensor"), [(1, 1), (2, 2), (3, 1), (3, 2), (4, 2)])
def test_projectors_are_a_sequential_of_linear_layers(depth: int, tensor: int) -> None:
    vision = replace(CLIP, feature_layer=(-2, -1))
    model = ModelConfig(vision=vision, language=LANGUAGE, projector=ProjectorConfig(type=f"mlp{depth}x_gelu"))
    torch.manual_seed(5)
    layers: list[nn.Module] = [nn.Linear(vision.feature_width, LANGUAGE.hidden_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(LANGUAGE.hidden_size, LANGUAGE.hidden_size)]
    expected = nn.Sequential(*layers)
    published = {f"model.mm_projector.{name}": tensor.detach() for name, tensor in expected.state_dict().items()}
    weights = to_megatron(published, model, naming=SHARE4V, components=("projector",))
    features = torch.randn(9, 2, vision.feature_width)
    for output in run_world(tensor, project, model, weights, features):
        torch.testing.assert_close(output, expected(features).detach(), rtol=FP32_MODULE, atol=FP32_MODULE)

"""The weight map covers exactly the model's tensors, is bitwise invertible, and names mismatches."""

from __future__ import annotations

import pytest
import torch
from harness import run_world

from megatron_share4v.checkpoint.hf.weight_map import (
    CLIP,
    LLAVA_HF,
    LLAVA_IN_MEMORY,
    SHARE4V,
    Naming,
    ignored_weights,
    to_hf,
    to_megatron,
    weight_mappings,
)
from megatron_share4v.config.model import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import iter_shards
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.layout import Layout

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_layers=3, num_attention_heads=2
    ),
    language=LanguageConfig(
        vocab_size=30, hidden_size=24, intermediate_size=20, num_layers=4, num_attention_heads=4, num_key_value_heads=2
    ),
)
LINEAR = ModelConfig(vision=MODEL.vision, language=MODEL.language, projector=ProjectorConfig(type="linear"))


def _hf_weights(model: ModelConfig, naming: Naming) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for mapping in weight_mappings(model, naming=naming)
        for name, shape in mapping.hf_shapes().items()
    }


def _shapes_of_shards(model: ModelConfig, parallel: ParallelConfig) -> dict[str, tuple[int, ...]]:
    layout = Layout.for_world(parallel, world_size=parallel.tensor * parallel.pipeline)
    with open_mesh(layout, device=Device("cpu")) as mesh:
        chunks = build_chunks(model, mesh=mesh, parallel=parallel, dtype=torch.float32)
        return {shard.key: shard.global_shape for shard in iter_shards(chunks)}


def shapes_at(parallel: ParallelConfig) -> list[dict[str, tuple[int, ...]]]:
    """Compare names and global shapes of one rank's shards with the weight map, for both projectors."""
    return [_shapes_of_shards(model, parallel) for model in (MODEL, LINEAR)]


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2, virtual=2)]
)
def test_the_map_has_the_models_tensors_at_every_layout(parallel: ParallelConfig) -> None:
    ranks = run_world(parallel.tensor * parallel.pipeline, shapes_at, parallel)
    for number, (model, naming) in enumerate([(MODEL, LLAVA_HF), (LINEAR, SHARE4V)]):
        built = {name: shape for rank in ranks for name, shape in rank[number].items()}
        assert built == {mapping.name: mapping.shape for mapping in weight_mappings(model, naming=naming)}


@pytest.mark.parametrize(
    ("model", "naming"), [(MODEL, LLAVA_HF), (MODEL, LLAVA_IN_MEMORY), (MODEL, SHARE4V), (LINEAR, SHARE4V)]
)
def test_every_weight_survives_the_mapping_and_its_inverse(model: ModelConfig, naming: Naming) -> None:
    hf_weights = _hf_weights(model, naming)
    back = to_hf(to_megatron(hf_weights, model, naming=naming), model, naming=naming)
    assert set(back) == set(hf_weights)
    assert all(torch.equal(back[name], hf_weights[name]) for name in hf_weights)


def test_from_one_layout_to_another_keeps_every_number() -> None:
    hf_weights = _hf_weights(MODEL, LLAVA_HF)
    moved = to_hf(to_megatron(hf_weights, MODEL, naming=LLAVA_HF), MODEL, naming=SHARE4V)
    assert torch.equal(
        moved["model.layers.3.mlp.up_proj.weight"], hf_weights["language_model.model.layers.3.mlp.up_proj.weight"]
    )
    tower = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
    assert torch.equal(moved[f"model.vision_tower.vision_tower.{tower}"], hf_weights[f"vision_tower.{tower}"])


def test_parts_can_come_from_different_places() -> None:
    hf_weights = _hf_weights(MODEL, SHARE4V)
    whole = to_megatron(hf_weights, MODEL, naming=SHARE4V)
    prefix = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(prefix): tensor for name, tensor in hf_weights.items() if name.startswith(prefix)}
    rest = {name: tensor for name, tensor in hf_weights.items() if not name.startswith(prefix)}
    joined = to_megatron(tower, MODEL, naming=CLIP, components=("vision",))
    joined |= to_megatron(rest, MODEL, naming=SHARE4V, components=("projector", "language"))
    assert set(joined) == set(whole) and all(torch.equal(joined[name], whole[name]) for name in whole)


def test_what_is_never_used_is_dropped_with_a_reason() -> None:
    hf_weights = _hf_weights(MODEL, SHARE4V)
    tower = "model.vision_tower.vision_tower.vision_model."
    unused = {
        f"{tower}post_layernorm.weight",
        f"{tower}encoder.layers.2.mlp.fc1.bias",
        f"{tower}embeddings.position_ids",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    megatron = to_megatron(hf_weights | {name: torch.zeros(1) for name in unused}, MODEL, naming=SHARE4V)
    assert set(megatron) == {mapping.name for mapping in weight_mappings(MODEL, naming=SHARE4V)}
    for name in unused:
        assert [drop.reason for drop in ignored_weights(MODEL, naming=SHARE4V) if drop.covers(name)]
    assert not [
        name for name in hf_weights if any(drop.covers(name) for drop in ignored_weights(MODEL, naming=SHARE4V))
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language_model.model.norm.weight": None}, r"missing: language_model\.model\.norm\.weight, of shape \(24,\)"),
        (
            {"language_model.model.layers.4.mlp.up_proj.weight": torch.zeros(20, 24)},
            r"unexpected: language_model\.model\.layers\.4\.mlp\.up_proj",
        ),
        (
            {"vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(23)},
            r"wrong shape: .*0\.mlp\.fc1\.bias is \(23,\).*\(24,\)",
        ),
        (
            {"language_model.lm_head.weight": torch.zeros(32, 24)},
            r"wrong shape: .*lm_head\.weight is \(32, 24\).*\(30, 24\)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    hf_weights = {
        name: tensor for name, tensor in (_hf_weights(MODEL, LLAVA_HF) | change).items() if tensor is not None
    }
    with pytest.raises(ConversionError, match=message):
        to_megatron(hf_weights, MODEL, naming=LLAVA_HF)


def test_the_way_back_is_checked_too() -> None:
    megatron = to_megatron(_hf_weights(MODEL, LLAVA_HF), MODEL, naming=LLAVA_HF)
    megatron["language.embedding.weight"] = torch.zeros(30, 24)
    del megatron["projector.mlp.linear_fc2.bias"]
    with pytest.raises(ConversionError) as error:
        to_hf(megatron, MODEL, naming=LLAVA_HF)
    assert "missing: projector.mlp.linear_fc2.bias" in str(error.value)
    assert "wrong shape: language.embedding.weight is (30, 24); the model configuration asks for (64, 24)" in str(
        error.value
    )


def test_another_model_gives_a_short_message() -> None:
    with pytest.raises(ConversionError, match=r"\.\.\. and \d+ more"):
        to_megatron({}, MODEL, naming=LLAVA_HF)


def test_a_layout_without_the_part_says_so() -> None:
    with pytest.raises(ConversionError, match="llava-hf has no projector of model.projector.type linear"):
        list(weight_mappings(LINEAR, naming=LLAVA_HF))
    with pytest.raises(ConversionError, match="CLIPVisionModel has no component language"):
        list(weight_mappings(MODEL, naming=CLIP, components=("language",)))

"""The weight map covers exactly the model's tensors, is bitwise invertible, and names mismatches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_world
from hf_fixtures import read_safetensors

from megatron_share4v.checkpoint.hf.weight_map import (
    CLIP,
    CLIP_IN_MEMORY,
    LLAVA_HF,
    LLAVA_IN_MEMORY,
    SHARE4V,
    Naming,
    ignored_weights,
    to_hf,
    to_megatron,
    unused_tower_shapes,
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
SIGLIP = replace(
    MODEL.vision,
    model_type="siglip_vision_model",
    class_token=False,
    feature_select="full",
    patch_bias=True,
    pre_norm=False,
    activation="gelu_tanh",
)
DINOV2 = replace(
    MODEL.vision,
    model_type="dinov2",
    intermediate_size=32,
    patch_bias=True,
    pre_norm=False,
    layer_scale=True,
    activation="gelu",
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


TOWERS = {
    "clip_vision_model": (MODEL.vision, "CLIPVisionConfig", {}),
    "siglip_vision_model": (SIGLIP, "SiglipVisionConfig", {}),
    "dinov2": (DINOV2, "Dinov2Config", {"mlp_ratio": 2}),
}


def _tower_class(name: str) -> Any:
    """Return transformers' tower with the sizes of TOWERS, with random weights."""
    import transformers

    vision, config, own = TOWERS[name]
    sizes = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
    }
    inner = own or {"intermediate_size": vision.intermediate_size}
    return transformers.AutoModel.from_config(getattr(transformers, config)(**sizes, **inner))


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_of_every_family_has_the_names_of_transformers(name: str, tmp_path: Path) -> None:
    """Classes and files; transformers 5 writes DINOv2 with other names than its classes have."""
    model = replace(MODEL, vision=TOWERS[name][0])
    tower = _tower_class(name)
    in_memory = to_megatron(tower.state_dict(), model, naming=CLIP_IN_MEMORY, components=("vision",))
    tower.save_pretrained(tmp_path)
    written, naming = read_safetensors(tmp_path), replace(CLIP_IN_MEMORY, in_memory=False)
    from_file = to_megatron(written, model, naming=naming, components=("vision",))
    assert set(from_file) == set(in_memory)
    assert all(torch.equal(from_file[key], in_memory[key]) for key in from_file)
    unused = {key: tuple(written[key].shape) for key in unused_tower_shapes(model)}
    assert unused == unused_tower_shapes(model)
    back = to_hf(from_file, model, naming=naming, components=("vision",))
    assert set(back) | set(unused) == set(written) and not set(back) & set(unused)
    assert all(torch.equal(back[key], written[key]) for key in back)


def test_published_towers_have_the_inner_prefix_of_their_family() -> None:
    prefixes = {name: LLAVA_HF.tower_prefix(vision) for name, (vision, _, _) in TOWERS.items()}
    inner = "vision_tower.vision_model."
    assert prefixes == {"clip_vision_model": inner, "siglip_vision_model": inner, "dinov2": "vision_tower."}


LANGUAGE = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
}
LANGUAGES = {
    "llama with biases": ("LlamaConfig", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    "qwen2 tied": ("Qwen2Config", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2Config", {}, {"qkv_bias": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, {"head_dim": 8, "qk_norm": True}),
    "mistral": ("MistralConfig", {"head_dim": 8}, {"head_dim": 8}),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_language_model_of_every_family_has_the_names_of_transformers(name: str) -> None:
    import transformers

    config, hf_reference, converted = LANGUAGES[name]
    reference = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**LANGUAGE, **hf_reference))
    weights = reference.state_dict()
    if "tied" in name and "untied" not in name:
        weights.pop("lm_head.weight")
    model = replace(MODEL, language=replace(MODEL.language, num_layers=2, **converted))
    megatron = to_megatron(weights, model, naming=SHARE4V, components=("language",))
    back = to_hf(megatron, model, naming=SHARE4V, components=("language",))
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    assert ("language.head.weight" in megatron) == ("lm_head.weight" in weights)


def test_a_group_has_its_queries_key_and_value_in_the_bias_too() -> None:
    """A bias row belongs to the weight row of the same number, whose first column it is here."""
    model = replace(MODEL, language=replace(MODEL.language, qkv_bias=True, num_layers=1))
    table = {row.name: row for row in weight_mappings(model, naming=SHARE4V, components=("language",))}
    weight, bias = (table[f"language.decoder.layers.0.self_attention.linear_qkv.{part}"] for part in ("weight", "bias"))
    parts = [torch.randn(rows, 24) for rows in (24, 12, 12)]
    fused = weight.transform.to_megatron(parts)
    assert torch.equal(bias.transform.to_megatron([part[:, 0] for part in parts]), fused[:, 0])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_projectors_of_every_depth_have_llavas_names(depth: int) -> None:
    vision = replace(MODEL.vision, feature_layer=(-2, -1))
    model = replace(MODEL, vision=vision, projector=ProjectorConfig(type=f"mlp{depth}x_gelu"))
    rows = list(weight_mappings(model, naming=SHARE4V, components=("projector",)))
    names = [name for row in rows for name in row.hf_names if name.endswith("weight")]
    assert names == [f"model.mm_projector.{2 * number}.weight" for number in range(depth)]
    shapes = [row.shape for row in rows if row.name.endswith("weight")]
    assert shapes == [(24, 32), *[(24, 24)] * (depth - 1)]
    if depth != 2:
        with pytest.raises(ConversionError, match=f"llava-hf has no projector of model.projector.type mlp{depth}x"):
            list(weight_mappings(model, naming=LLAVA_HF, components=("projector",)))

"""Importable models: every published directory layout, and models assembled from parts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from hf_fixtures import (
    CLIP,
    LLAVA_HF,
    MODEL,
    SHARE4V,
    clip_config,
    llama_config,
    random_hf_weights,
    share4v_config,
    write_clip,
    write_json,
    write_llama,
    write_llava_hf,
    write_share4v,
    write_tokenizer,
    write_weights,
)

from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model, megatron_tensors
from megatron_share4v.checkpoint.hf.source.model import HfSource, open_hf_model
from megatron_share4v.checkpoint.hf.weight_map import LLAVA_IN_MEMORY, Naming, to_megatron
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor
from megatron_share4v.config.load import restore
from megatron_share4v.config.run import RunConfig
from megatron_share4v.model.initialize import initial_value

ALL = ("vision", "projector", "language")
V4_52 = Naming(
    title="transformers 4.52",
    tower="model.vision_tower.vision_model.",
    projector_mlp=("model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    decoder="model.language_model.",
    head="lm_head.",
)
V5_SAVED = Naming(
    title="transformers 5 save_pretrained",
    tower="vision_tower.",
    projector_mlp=LLAVA_HF.projector_mlp,
    decoder=LLAVA_HF.decoder,
    head=LLAVA_HF.head,
)


def same(found: dict[str, LazyTensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name].read(), tensor) for name, tensor in expected.items())


def parts_in_ours(*, seed_of_tower: int = 0) -> dict[str, torch.Tensor]:
    language = to_megatron(
        random_hf_weights(MODEL, SHARE4V, "language"), MODEL, naming=SHARE4V, components=("language",)
    )
    vision = to_megatron(
        random_hf_weights(MODEL, CLIP, "vision", seed=seed_of_tower), MODEL, naming=CLIP, components=("vision",)
    )
    return {**vision, **language}


@pytest.mark.parametrize("naming", [LLAVA_HF, V4_52, LLAVA_IN_MEMORY, V5_SAVED], ids=lambda naming: naming.title)
def test_every_naming_of_transformers(naming: Naming, tmp_path: Path) -> None:
    source = open_hf_model(HfSource(directory=write_llava_hf(tmp_path / "hf", naming=naming)))
    assert source.config == MODEL
    whole = random_hf_weights(MODEL, naming, *ALL)
    assert same(megatron_tensors(source, seed=0), to_megatron(whole, MODEL, naming=naming))
    assert source.added_rows["embedding"].shape == (20, 48) and len(source.unused()) == 18


def test_configuration_of_transformers_5(tmp_path: Path) -> None:
    directory = write_llava_hf(tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    text = config["text_config"]
    del text["rope_theta"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    config["image_token_id"] = config.pop("image_token_index")
    write_json(directory / "config.json", config)
    assert open_hf_model(HfSource(directory=directory)).config.language.rope_theta == 5000.0


def test_what_transformers_leaves_out_is_its_default() -> None:
    """The hub's llava-1.5-7b-hf states only values that differ from LlamaConfig."""
    from megatron_share4v.checkpoint.hf.config import parse_model_config
    from megatron_share4v.config.model import LanguageConfig, VisionConfig

    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
    found = parse_model_config(
        {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": tower},
        where="config.json",
    )
    assert (
        found.model.language == LanguageConfig(vocab_size=32064)
        and found.model.vision == VisionConfig()
        and found.image_token == 32000
    )


@pytest.mark.parametrize("place", ["inside", "vision_tower", "clip", "named", "sibling", "given"])
def test_share4v_with_its_tower_anywhere(place: str, tmp_path: Path) -> None:
    tower_name = {"named": str(tmp_path / "elsewhere"), "sibling": "Lin-Chen/tower", "given": "Lin-Chen/tower"}.get(
        place, "openai/clip"
    )
    directory = write_share4v(tmp_path / "s4v", tower=tower_name, inside=place == "inside")
    folders = {"vision_tower": directory / "vision_tower", "clip": directory / "clip", "named": tmp_path / "elsewhere"}
    folders |= {"sibling": tmp_path / "tower", "given": tmp_path / "far" / "tower"}
    if place == "inside":
        write_json(directory / "vision_tower" / "config.json", clip_config(MODEL))
    else:
        write_clip(folders[place])
    source = open_hf_model(HfSource(directory=directory, tower=folders[place] if place == "given" else None))
    assert source.config == MODEL and source.image_aspect_ratio == "pad"
    megatron = megatron_tensors(source, seed=0)
    if place == "inside":
        assert same(
            megatron,
            to_megatron(random_hf_weights(MODEL, SHARE4V, "projector", "language", "vision"), MODEL, naming=SHARE4V),
        )
    else:
        projector = random_hf_weights(MODEL, SHARE4V, "projector", "language")
        main = to_megatron(projector, MODEL, naming=SHARE4V, components=("projector", "language"))
        assert same(
            megatron,
            {
                **main,
                **to_megatron(random_hf_weights(MODEL, CLIP, "vision"), MODEL, naming=CLIP, components=("vision",)),
            },
        )


def test_the_shape_of_an_undescribed_tower_is_read_off_its_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_share4v(tmp_path / "s4v", inside=True)
    with caplog.at_level(logging.INFO, logger="megatron_share4v"):
        vision = open_hf_model(HfSource(directory=directory)).config.vision
    assert "heads assumed" in caplog.text
    assert (vision.num_layers, vision.image_size, vision.patch_size, vision.intermediate_size) == (4, 28, 14, 48)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_from_parts_without_a_projector(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = HfSource(
        directory=write_llama(tmp_path / "vicuna", suffix=suffix), tower=write_clip(tmp_path / "clip-large")
    )
    with caplog.at_level(logging.WARNING, logger="megatron_share4v"):
        manifest = import_model(request, tmp_path / "megatron", options=ImportOptions(seed=7))
    assert "projector: none was given, so it is freshly initialised (seed 7)" in caplog.text
    assert set(manifest.weights) == {"vision", "projector", "language"}
    assert restore(RunConfig, manifest.config).model == MODEL
    megatron = megatron_tensors(open_hf_model(request), seed=7)
    fresh = {
        name: initial_value(name, megatron[name].shape, seed=7, model=MODEL)
        for name in megatron
        if name.startswith("projector.")
    }
    assert len(fresh) == 4 and same(megatron, {**parts_in_ours(), **fresh})


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_from_parts_with_a_projector(kind: str, tmp_path: Path) -> None:
    if kind == "mlp2x_gelu":
        projector = random_hf_weights(MODEL, SHARE4V, "projector")
    else:
        projector = {"model.mm_projector.weight": torch.randn(48, 32), "model.mm_projector.bias": torch.randn(48)}
    torch.save(projector, tmp_path / "mm_projector.bin")
    request = HfSource(
        directory=write_llama(tmp_path / "v"), tower=write_clip(tmp_path / "c"), projector=tmp_path / "mm_projector.bin"
    )
    source = open_hf_model(request)
    assert source.config.projector.type == kind
    expected = to_megatron(projector, source.config, naming=SHARE4V, components=("projector",))
    assert same(megatron_tensors(source, seed=0), {**parts_in_ours(), **expected})


def test_stage_1_directory_with_a_projector_alone(tmp_path: Path) -> None:
    """LLaVA's adapter mode: config.json and mm_projector.bin, on a base model."""
    directory = tmp_path / "stage1"
    write_json(directory / "config.json", share4v_config(MODEL, tower="clip-large"))
    torch.save(random_hf_weights(MODEL, SHARE4V, "projector"), directory / "mm_projector.bin")
    write_clip(tmp_path / "clip-large")
    source = open_hf_model(HfSource(directory=directory, base=write_llama(tmp_path / "vicuna")))
    expected = to_megatron(
        random_hf_weights(MODEL, SHARE4V, "projector"), MODEL, naming=SHARE4V, components=("projector",)
    )
    assert same(megatron_tensors(source, seed=0), {**parts_in_ours(), **expected})


def write_lora(
    directory: Path, *, base: dict[str, torch.Tensor], rank: int = 2, **options: object
) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter of two matrices and a projector; return the merged matrices."""
    generator = torch.Generator().manual_seed(3)
    adapter, merged = {}, {}
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        rows, columns = base[name].shape
        down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        merged[name] = base[name] + 4.0 * (up @ down)
    directory.mkdir(parents=True)
    torch.save(adapter, directory / "adapter_model.bin")
    write_json(directory / "adapter_config.json", {"r": rank, "lora_alpha": 8, "peft_type": "LORA", **options})
    projector = random_hf_weights(MODEL, SHARE4V, "projector")
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()},
        directory / "non_lora_trainables.bin",
    )
    write_json(directory / "config.json", share4v_config(MODEL, tower="clip-large"))
    return {**merged, **projector}


def test_lora_is_merged(tmp_path: Path) -> None:
    base = random_hf_weights(MODEL, SHARE4V, "language")
    merged = write_lora(tmp_path / "lora", base=base)
    write_clip(tmp_path / "clip-large")
    source = open_hf_model(HfSource(directory=tmp_path / "lora", base=write_llama(tmp_path / "vicuna")))
    expected = to_megatron({**base, **merged}, MODEL, naming=SHARE4V, components=("projector", "language"))
    vision = {name: tensor for name, tensor in parts_in_ours().items() if name.startswith("vision.")}
    assert same(megatron_tensors(source, seed=0), {**expected, **vision})


def test_delta_is_added(tmp_path: Path) -> None:
    """Buffers of old releases are ignored on both sides."""
    base, whole = (
        random_hf_weights(MODEL, SHARE4V, "language", seed=1),
        random_hf_weights(MODEL, SHARE4V, "projector", "language"),
    )
    delta = {name: tensor - base[name] if name in base else tensor for name, tensor in whole.items()}
    delta["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    delta["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write_weights(tmp_path / "delta", delta, suffix="bin")
    write_json(tmp_path / "delta" / "config.json", share4v_config(MODEL, tower="clip-large"))
    write_clip(tmp_path / "clip-large")
    write_weights(tmp_path / "llama", base)
    write_json(tmp_path / "llama" / "config.json", llama_config(MODEL))
    write_tokenizer(tmp_path / "llama" / "tokenizer.model")
    source = open_hf_model(HfSource(directory=tmp_path / "delta", base=tmp_path / "llama", delta=True))
    megatron = megatron_tensors(source, seed=0)
    expected = to_megatron(whole, MODEL, naming=SHARE4V, components=("projector", "language"))
    assert all(torch.allclose(megatron[name].read(), tensor, atol=1e-6) for name, tensor in expected.items())
    assert torch.equal(megatron["projector.mlp.linear_fc1.weight"].read(), whole["model.mm_projector.0.weight"])

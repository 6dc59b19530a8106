"""Imports of broken and unsupported models are refused before writing, with the name of the tensor, key or file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_fixtures import (
    MODEL,
    random_hf_weights,
    read_safetensors,
    write_clip,
    write_json,
    write_llama,
    write_llava_hf,
    write_share4v,
    write_tokenizer,
    write_weights,
)

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.weight_map import LLAVA_HF, SHARE4V
from megatron_share4v.errors import ConfigError, ConversionError

Change = Callable[[dict[str, torch.Tensor]], None]
EMBEDDING, CLASS = "language_model.model.embed_tokens.weight", "vision_tower.vision_model.embeddings.class_embedding"
PATCH = CLASS.replace("class_embedding", "patch_embedding.weight")
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
DOWN = "language_model.model.layers.2.mlp.down_proj.weight"


def refused(source: HfSource, target: Path) -> str:
    """Return the message of a refused import."""
    with pytest.raises(ConversionError) as caught:
        import_model(source, target, options=ImportOptions())
    assert not target.exists()
    return str(caught.value)


def _drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


TENSORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (_drop(DOWN), ("missing", DOWN)),
    "missing class token": (_drop(CLASS), ("missing", CLASS)),
    "missing patch convolution": (_drop(PATCH), ("missing tensor", "patch_embedding.weight", "no vision tower")),
    "missing head": (_drop("language_model.lm_head.weight"), ("missing tensor", "lm_head.weight")),
    "missing projector": (
        _drop("multi_modal_projector.linear_1.weight"),
        ("missing tensor: multi_modal_projector.linear_1.weight",),
    ),
    "two projectors": (
        lambda tensors: tensors.update({"model.mm_projector.0.weight": torch.zeros(2, 2)}),
        ("two projectors", "mm_projector.0.weight"),
    ),
    "unexpected": (
        lambda tensors: tensors.update({"language_model.model.layers.9.x": torch.zeros(2)}),
        ("unexpected", "layers.9.x"),
    ),
    "wrong shape": (_set(QUERY, lambda tensor: tensor[:-1]), ("wrong shape", QUERY)),
    "transposed": (_set(DOWN, lambda tensor: tensor.t()), ("wrong shape", DOWN)),
    "quantised": (_set(QUERY, lambda tensor: tensor.to(torch.int8)), ("wrong dtype", QUERY, "int8")),
    "mixed dtypes": (
        _set(QUERY, lambda tensor: tensor.half()),
        ("wrong dtype", QUERY.replace("q_proj", "k_proj"), QUERY),
    ),
    "vocabulary too small": (
        _set(EMBEDDING, lambda tensor: tensor[:200]),
        ("vocabulary too small", EMBEDDING, "200", "300"),
    ),
    "vocabulary cut": (_set(EMBEDDING, lambda tensor: tensor[:310]), ("wrong shape", EMBEDDING, "310", "320")),
    "two towers": (
        lambda tensors: tensors.update({"vision_model.embeddings.patch_embedding.weight": torch.zeros(32)}),
        ("two towers", PATCH),
    ),
    "two language models": (
        lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(2, 2)}),
        ("two language models", EMBEDDING),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, copy: Path, tmp_path: Path) -> None:
    change, words = TENSORS[case]
    tensors = read_safetensors(copy)
    change(tensors)
    write_weights(copy, tensors)
    message = refused(HfSource(directory=copy), tmp_path / "megatron")
    assert all(word in message for word in words), message


CONFIGS: dict[str, tuple[dict, dict, tuple[str, ...]]] = {
    "another model": ({"model_type": "qwen2_vl"}, {}, ("foreign architecture", "qwen2_vl")),
    "activation": ({}, {"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
    "tied": ({}, {"tie_word_embeddings": True}, ("tie_word_embeddings",)),
    "rope scaling": ({}, {"rope_scaling": {"type": "linear"}}, ("rope_scaling",)),
    "rope kind": ({}, {"rope_parameters": {"rope_type": "llama3"}}, ("rope_type", "llama3")),
    "feature layer": ({"vision_feature_layer": -9}, {}, ("feature_layer -9",)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, copy: Path, tmp_path: Path) -> None:
    outer, text, words = CONFIGS[case]
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", {**config, **outer, "text_config": {**config["text_config"], **text}})
    message = refused(HfSource(directory=copy), tmp_path / "megatron")
    assert "config.json" in message and all(word in message for word in words), message


def test_files(copy: Path, tmp_path: Path) -> None:
    target, weights = tmp_path / "megatron", copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    message = refused(HfSource(directory=copy), target)
    assert "truncated" in message and "model.safetensors" in message and "_tower" in message  # the last tensor's name
    weights.write_bytes(whole[:40])
    assert "truncated" in refused(HfSource(directory=copy), target)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in refused(HfSource(directory=copy), target)
    weights.unlink()
    assert "holds no weights" in refused(HfSource(directory=copy), target)
    weights.write_bytes(whole)
    (copy / "tokenizer.model").unlink()
    assert "--tokenizer" in refused(HfSource(directory=copy), target)
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(HfSource(directory=copy), target)
    (copy / "config.json").unlink()
    assert "config.json" in refused(HfSource(directory=copy), target)
    assert "no such directory" in refused(HfSource(directory=tmp_path / "nowhere"), target)


def test_shards(tmp_path: Path) -> None:
    source, target = write_llava_hf(tmp_path / "hf", shards=3), tmp_path / "megatron"
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    write_json(index, {"weight_map": {**content["weight_map"], "extra.weight": "model-00001-of-00003.safetensors"}})
    assert "missing tensor: extra.weight" in refused(HfSource(directory=source), target)
    index.unlink()
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "2 of 3 weight shards" in refused(HfSource(directory=source), target)
    tensors = read_safetensors(source)
    name = sorted(tensors)[0]
    write_weights(source, {name: tensors[name].clone()})
    (source / "model.safetensors").rename(source / "model-00002-of-00003.safetensors")
    assert f"{name} occurs twice" in refused(HfSource(directory=source), target)


def test_bin_shards(tmp_path: Path) -> None:
    source, target = write_share4v(tmp_path / "s4v", inside=True), tmp_path / "megatron"
    shard = source / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in refused(HfSource(directory=source), target) and not target.exists()
    torch.save({"model.norm.weight": [1, 2]}, shard)
    assert "model.norm.weight is list, not a tensor" in refused(HfSource(directory=source), target)
    torch.save({"f": torch.nn.Linear(2, 2)}, shard)
    assert "objects other than tensors" in refused(HfSource(directory=source), target)


def test_towers(tmp_path: Path) -> None:
    target, tower = tmp_path / "megatron", write_clip(tmp_path / "other")
    source = write_share4v(tmp_path / "s4v")
    message = refused(HfSource(directory=source), target)
    assert "Lin-Chen/tower" in message and "--tower" in message
    message = refused(HfSource(directory=source, tower=tower), target)
    assert "another tower than" in message and "Lin-Chen/tower" in message and "--any-tower" in message
    import_model(
        HfSource(directory=source, tower=tower, any_tower=True), tmp_path / "accepted", options=ImportOptions()
    )
    assert "is no tower" in refused(HfSource(directory=source, tower=tmp_path, any_tower=True), target)
    inside = write_share4v(tmp_path / "inside", inside=True)
    message = refused(HfSource(directory=inside, tower=tower, any_tower=True), target)
    assert "two towers" in message and "embeddings.patch_embedding.weight" in message
    write_clip(source / "clip")
    write_clip(source / "vision_tower")
    assert "two towers" in refused(HfSource(directory=source), target)


def test_an_export_knows_its_tower(tmp_path: Path) -> None:
    write_clip(tmp_path / "tower")
    import_model(
        HfSource(directory=write_share4v(tmp_path / "s4v"), tower=tmp_path / "tower"),
        tmp_path / "megatron",
        options=ImportOptions(),
    )
    export_model(tmp_path / "megatron", tmp_path / "out", layout="share4v")
    tensors = read_safetensors(tmp_path / "out" / "clip")
    write_weights(tmp_path / "out" / "clip", {name: tensor + 1 for name, tensor in tensors.items()})
    message = refused(HfSource(directory=tmp_path / "out"), tmp_path / "again")
    assert "another tower than" in message and "provenance.json" in message
    for dtype in ("bf16", "fp32"):
        with pytest.raises(ConversionError, match="another tower than"):
            import_model(HfSource(directory=tmp_path / "out"), tmp_path / "again", options=ImportOptions(dtype=dtype))
    import_model(HfSource(directory=tmp_path / "out", any_tower=True), tmp_path / "again", options=ImportOptions())


def test_parts(tmp_path: Path) -> None:
    llama, tower, target = write_llama(tmp_path / "llama"), write_clip(tmp_path / "clip"), tmp_path / "megatron"
    assert "no vision tower" in refused(HfSource(directory=llama), target)
    torch.save({"model.norm.weight": torch.zeros(2)}, tmp_path / "p.bin")
    assert "unexpected tensor: model.norm.weight" in refused(
        HfSource(directory=llama, tower=tower, projector=tmp_path / "p.bin"), target
    )
    projector = random_hf_weights(MODEL, SHARE4V, "projector")
    projector["model.mm_projector.2.weight"] = torch.zeros(3, 3)
    torch.save(projector, tmp_path / "p.bin")
    assert "wrong shape: model.mm_projector.2.weight" in refused(
        HfSource(directory=llama, tower=tower, projector=tmp_path / "p.bin"), target
    )
    assert "is not used" in refused(HfSource(directory=llama, base=llama, tower=tower), target)
    write_json(tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    write_json(tmp_path / "lora" / "config.json", json.loads((llama / "config.json").read_text()))
    assert "--base" in refused(HfSource(directory=tmp_path / "lora"), target)
    assert "adapter_model" in refused(HfSource(directory=tmp_path / "lora", base=llama, tower=tower), target)
    pair = {f"base_model.model.model.layers.9.mlp.up_proj.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    torch.save(pair, tmp_path / "lora" / "adapter_model.bin")
    assert "model.layers.9.mlp.up_proj.weight" in refused(
        HfSource(directory=tmp_path / "lora", base=llama, tower=tower), target
    )
    write_json(
        tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_bias": True}
    )
    assert "lora_bias" in refused(HfSource(directory=tmp_path / "lora", base=llama, tower=tower), target)


def test_fp16_that_overflows_while_it_is_imported(copy: Path, tmp_path: Path) -> None:
    tensors = read_safetensors(copy)
    unused = "vision_tower.vision_model.post_layernorm.weight"
    for name, value in ((DOWN, 1e6), (unused, -1e5), (EMBEDDING, 7e4)):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name].view(-1)[-1] = value
        write_weights(copy, changed)
        with pytest.raises(ConversionError, match="has values beyond fp16's 65504"):
            import_model(HfSource(directory=copy), tmp_path / "megatron", options=ImportOptions(dtype="fp16"))
        assert not (tmp_path / "megatron").exists()
    changed[EMBEDDING].view(-1)[-1] = float("inf")  # as it was
    write_weights(copy, changed)
    import_model(HfSource(directory=copy), tmp_path / "megatron", options=ImportOptions(dtype="fp16"))


def test_a_template_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template 'nope' does not exist"):
        import_model(
            HfSource(directory=tmp_path / "not looked at"),
            tmp_path / "megatron",
            options=ImportOptions(template="nope"),
        )


def test_options_that_would_be_ignored(copy: Path, tmp_path: Path) -> None:
    tower, target = write_clip(tmp_path / "clip"), tmp_path / "megatron"
    message = refused(HfSource(directory=copy, tower=tower), target)
    assert "two towers" in message and str(tower) in message and "--tower" in message
    write_json(tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    write_json(tmp_path / "lora" / "config.json", json.loads((copy / "config.json").read_text()))
    for base in (None, copy):
        assert "is an adapter, no delta weights; leave --delta out" in refused(
            HfSource(directory=tmp_path / "lora", base=base, delta=True), target
        )


def test_parts_without_their_base_are_named(copy: Path, tmp_path: Path) -> None:
    target, adapter, projector = tmp_path / "megatron", tmp_path / "lora", tmp_path / "stage1"
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    projector.mkdir()
    torch.save({}, projector / "mm_projector.bin")
    assert "lora: is an adapter; give the model that it belongs to with --base" in refused(
        HfSource(directory=adapter), target
    )
    assert "stage1: is only a projector; give the model" in refused(HfSource(directory=projector), target)
    for source in (adapter, copy):
        assert "nowhere: there is no such directory" in refused(
            HfSource(directory=source, base=tmp_path / "nowhere"), target
        )
    assert "stage1/config.json: missing" in refused(HfSource(directory=adapter, base=projector), target)


def test_a_target_that_cannot_be_created(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/.* cannot be read or written .*: Not a directory"):
        import_model(HfSource(directory=copy), tmp_path / "file" / "megatron", options=ImportOptions())


@pytest.mark.parametrize("token", [7, 299, 320, -1])
def test_an_image_token_that_is_no_added_one(token: int, copy: Path, tmp_path: Path) -> None:
    write_json(copy / "config.json", {**json.loads((copy / "config.json").read_text()), "image_token_index": token})
    message = refused(HfSource(directory=copy), tmp_path / "megatron")
    assert f"image_token_index {token}" in message and "300 .. 319" in message


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_a_share4v_model_without_its_projector(kind: str, tmp_path: Path) -> None:
    source = write_share4v(tmp_path / "s4v", inside=True)
    write_json(source / "config.json", {**json.loads((source / "config.json").read_text()), "mm_projector_type": kind})
    for path in source.glob("*.bin"):
        torch.save({name: tensor for name, tensor in torch.load(path).items() if "mm_projector" not in name}, path)
    (source / "pytorch_model.bin.index.json").unlink()
    name = "model.mm_projector.weight" if kind == "linear" else "model.mm_projector.0.weight"
    assert f"missing tensor: {name}" in refused(HfSource(directory=source), tmp_path / "megatron")


def test_a_source_that_cannot_be_read(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is about reading the source, not about writing the target."""
    from megatron_share4v.checkpoint.hf import importer

    started = importer.write_weights_checkpoint

    def lost(*arguments: object, **options: object) -> object:
        (copy / "model.safetensors").unlink()
        return started(*arguments, **options)

    monkeypatch.setattr(importer, "write_weights_checkpoint", lost)
    message = refused(HfSource(directory=copy), tmp_path / "megatron")
    assert f"{copy / 'model.safetensors'}: cannot be read (No such file" in message and "written" not in message


def test_the_tokenizer_of_another_model(copy: Path, tmp_path: Path) -> None:
    tensors = random_hf_weights(MODEL, LLAVA_HF, "language")
    assert tensors[EMBEDDING].shape[0] == 300
    config = json.loads((copy / "config.json").read_text())
    small = {
        name: tensor[:256] if tensor.shape[0] == 320 else tensor for name, tensor in read_safetensors(copy).items()
    }
    write_weights(copy, {name: tensor.contiguous() for name, tensor in small.items()})
    write_json(copy / "config.json", {**config, "text_config": {**config["text_config"], "vocab_size": 256}})
    source = HfSource(directory=copy, tokenizer=write_tokenizer(tmp_path / "other.model"))
    assert "vocabulary too small" in refused(source, tmp_path / "megatron")

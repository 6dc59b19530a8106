"""Small Hugging Face models with fixed random weights for tests; tensor names come from the weight map."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_tokenizer import train_llama_like

from megatron_share4v.checkpoint.hf.weight_map import (
    CLIP,
    LLAVA_HF,
    SHARE4V,
    Component,
    Naming,
    unused_tower_shapes,
    weight_mappings,
)
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig

PIECES = 300
WORDS = [
    "a",
    "cat",
    "sleeps",
    "on",
    "the",
    "sofa",
    "USER:",
    "what",
    "is",
    "this?",
    "ASSISTANT:",
    "it",
    "is",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "left",
    "of",
    "right",
    "above",
    "below",
]
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=48, num_layers=4, num_attention_heads=2
    ),
    language=LanguageConfig(
        vocab_size=PIECES,
        hidden_size=48,
        intermediate_size=64,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
)


def write_tokenizer(path: Path) -> Path:
    """Train a LLaMA-like sentencepiece model with exactly PIECES pieces."""
    sentences = (" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(12)) for i in range(60))
    return train_llama_like(path, sentences, vocab_size=PIECES, hard_vocab_limit=True)


def random_hf_weights(
    model: ModelConfig, naming: Naming, *components: Component, dtype: str = "fp32", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return random tensors of `components`, including the tower's unused ones."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        name: shape
        for mapping in weight_mappings(model, naming=naming, components=components)
        for name, shape in mapping.hf_shapes().items()
    }
    if "vision" in components:
        shapes |= {f"{naming.tower}{name}": shape for name, shape in unused_tower_shapes(model).items()}
    return {name: _value(name, shape, generator).to(TORCH[dtype]) for name, shape in shapes.items()}


def _value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    size = torch.Size(shape).numel()
    noise = torch.randn(
        min(size, 1_000_003), generator=generator
    )  # prime, so that no two rows of a large matrix are equal
    noise = noise.repeat(-(-size // noise.numel()))[:size].view(shape)
    return 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise


def clip_config(model: ModelConfig) -> dict[str, Any]:
    vision = model.vision
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "quick_gelu",
    }


def llama_config(model: ModelConfig) -> dict[str, Any]:
    language = model.language
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_weights(
    directory: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, suffix: str = "safetensors"
) -> None:
    """Write one file, or shards with an index, with the safetensors library or torch.save."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save: Callable = (
        (lambda part, path: save_file(part, path, metadata={"format": "pt"})) if suffix == "safetensors" else torch.save
    )
    if shards == 1:
        save(tensors, directory / f"{stem}.{suffix}")
        return
    names = list(tensors)
    files = {
        name: f"{stem}-{1 + number * shards // len(names):05d}-of-{shards:05d}.{suffix}"
        for number, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save({name: tensors[name] for name in names if files[name] == file}, directory / file)
    write_json(directory / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": files})


def write_llava_hf(
    directory: Path, model: ModelConfig = MODEL, *, dtype: str = "fp32", shards: int = 1, naming: Naming = LLAVA_HF
) -> Path:
    """Write a llava-hf model as on the hub: <image> and <pad> after the pieces, rows up to a multiple of 64."""
    tensors = random_hf_weights(model, naming, "vision", "projector", "language", dtype=dtype)
    rows_there = -(-(model.language.vocab_size + 2) // 64) * 64
    generator = torch.Generator().manual_seed(1)
    for name in (f"{naming.decoder}embed_tokens.weight", f"{naming.head}weight"):
        # Small, as on the hub: large rows could win the argmax.
        added = 0.01 * torch.randn(
            rows_there - model.language.vocab_size, model.language.hidden_size, generator=generator
        )
        tensors[name] = torch.cat([tensors[name], added.to(TORCH[dtype])])
    write_weights(directory, tensors, shards=shards)
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": model.language.vocab_size,
        "pad_token_id": model.language.vocab_size + 1,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": model.vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "text_config": {**llama_config(model), "vocab_size": rows_there},
        "vision_config": clip_config(model),
    }
    write_json(directory / "config.json", config)
    write_tokenizer(directory / "tokenizer.model")
    return directory


def write_clip(directory: Path, model: ModelConfig = MODEL, *, dtype: str = "fp32", seed: int = 0) -> Path:
    """Write a CLIP tower as .bin, with the buffer of old releases."""
    tensors = random_hf_weights(model, CLIP, "vision", dtype=dtype, seed=seed)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(model.vision.num_patches + 1)[None]
    write_weights(directory, tensors, suffix="bin")
    write_json(directory / "config.json", clip_config(model))
    return directory


def write_llama(
    directory: Path, model: ModelConfig = MODEL, *, dtype: str = "fp32", seed: int = 0, suffix: str = "safetensors"
) -> Path:
    """Write a LLaMA model, as Vicuna."""
    write_weights(directory, random_hf_weights(model, SHARE4V, "language", dtype=dtype, seed=seed), suffix=suffix)
    write_json(directory / "config.json", llama_config(model))
    write_tokenizer(directory / "tokenizer.model")
    return directory


def share4v_config(model: ModelConfig, *, tower: str) -> dict[str, Any]:
    return {
        **llama_config(model),
        "model_type": "share4v",
        "architectures": ["Share4VLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": model.vision.hidden_size,
        "mm_projector_type": model.projector.type,
        "mm_vision_select_layer": model.vision.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": tower,
        "mm_use_im_start_end": False,
    }


def write_share4v(
    directory: Path,
    model: ModelConfig = MODEL,
    *,
    tower: str = "Lin-Chen/tower",
    inside: bool = False,
    dtype: str = "fp32",
) -> Path:
    """Write a ShareGPT4V model as released: two .bin shards with buffers of old releases; the tower elsewhere or
    inside.
    """
    components: tuple[Component, ...] = ("projector", "language", *(("vision",) if inside else ()))
    tensors = random_hf_weights(model, SHARE4V, *components, dtype=dtype)
    for layer in range(model.language.num_layers):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    write_weights(directory, tensors, shards=2, suffix="bin")
    write_json(directory / "config.json", share4v_config(model, tower=tower))
    write_tokenizer(directory / "tokenizer.model")
    return directory


def read_safetensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read all safetensors of a directory with the library."""
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }

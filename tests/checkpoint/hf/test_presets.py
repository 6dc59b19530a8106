"""Presets of examples/models hold what the importer reads from the published config.json files.

A run starts only from a checkpoint whose model section is its own, so every field must be equal.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_share4v.checkpoint.hf.image_processor import parse_image_processor
from megatron_share4v.checkpoint.hf.text_config import parse_text_config
from megatron_share4v.checkpoint.hf.vision_config import parse_vision_config
from megatron_share4v.config.load import load
from megatron_share4v.config.model import LanguageConfig, VisionConfig

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
LLAMA_3 = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05, "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_ROPE = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06, "hidden_act": "silu", "sliding_window": 32768, "use_sliding_window": False,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN2_LARGE = QWEN2 | {"vocab_size": 152064, "tie_word_embeddings": False, "sliding_window": 131072}
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000,
    "rms_norm_eps": 1e-06, "hidden_act": "silu", "head_dim": 128, "attention_bias": False, "rope_scaling": None,
    "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True,
}  # fmt: skip
LONG = {"max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, **LLAMA_3_ROPE}}
SMALL = {"max_position_embeddings": 131072, "rope_scaling": {"factor": 32.0, **LLAMA_3_ROPE}}
SMALL["tie_word_embeddings"] = True
VICUNA = {
    "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "rope_scaling": None,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-05, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
LANGUAGE_MODELS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "vicuna_7b": ((32, 4096, 32, 32, 11008), VICUNA),
    "vicuna_13b": ((40, 5120, 40, 40, 13824), VICUNA),
    "llama_3_8b": ((32, 4096, 32, 8, 14336), LLAMA_3),
    "llama_3.1_8b": ((32, 4096, 32, 8, 14336), LLAMA_3 | LONG),
    "llama_3.2_1b": ((16, 2048, 32, 8, 8192), LLAMA_3 | SMALL | {"head_dim": 64}),
    "llama_3.2_3b": ((28, 3072, 24, 8, 8192), LLAMA_3 | SMALL | {"head_dim": 128}),
    "qwen2.5_0.5b": ((24, 896, 14, 2, 4864), QWEN2),
    "qwen2.5_1.5b": ((28, 1536, 12, 2, 8960), QWEN2),
    "qwen2.5_3b": ((36, 2048, 16, 2, 11008), QWEN2),
    "qwen2.5_7b": ((28, 3584, 28, 4, 18944), QWEN2_LARGE),
    "qwen2.5_14b": ((48, 5120, 40, 8, 13824), QWEN2_LARGE),
    "qwen3_0.6b": ((28, 1024, 16, 8, 3072), QWEN3),
    "qwen3_1.7b": ((28, 2048, 16, 8, 6144), QWEN3),
    "qwen3_4b": ((36, 2560, 32, 8, 9728), QWEN3),
    "qwen3_8b": ((36, 4096, 32, 8, 12288), QWEN3 | {"tie_word_embeddings": False}),
    "qwen3_14b": ((40, 5120, 40, 8, 17408), QWEN3 | {"tie_word_embeddings": False}),
    "mistral_7b": ((32, 4096, 32, 8, 14336), MISTRAL),
}
SIGLIP = {
    "model_type": "siglip",
    "vision_config": {
        "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip
SIGLIP_IMAGES = {
    "image_processor_type": "SiglipImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "size": {"height": 384, "width": 384}, "do_resize": True,
}  # fmt: skip
CLIP = {
    "model_type": "clip",
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "hidden_act": "quick_gelu",
    },
}  # fmt: skip
CLIP_IMAGES = {"size": 336, "crop_size": 336, "do_center_crop": True, "resample": 3}
DINOV2 = {
    "model_type": "dinov2", "hidden_size": 1024, "image_size": 518, "mlp_ratio": 4, "num_attention_heads": 16,
    "num_hidden_layers": 24, "patch_size": 14, "layer_norm_eps": 1e-06, "hidden_act": "gelu", "qkv_bias": True,
    "use_swiglu_ffn": False, "layerscale_value": 1.0,
}  # fmt: skip
DINOV2_IMAGES = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "resample": 3, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip_l_336": (CLIP, CLIP_IMAGES),
    "siglip_so400m_384": (SIGLIP, SIGLIP_IMAGES | {"resample": 3}),
    "siglip2_so400m_384": (SIGLIP, SIGLIP_IMAGES | {"resample": 2}),
    "dinov2_l": (DINOV2, DINOV2_IMAGES),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name: str, repository: Path) -> None:
    sizes, config = LANGUAGE_MODELS[name]
    read = parse_text_config(config | dict(zip(SIZES, sizes)), where=name)
    assert read == load(LanguageConfig, repository / f"examples/models/language/{name}.yaml")


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name: str, repository: Path) -> None:
    config, images = TOWERS[name]
    read = parse_vision_config(config, where=name)
    read = parse_image_processor(images, read, is_trained=False, where=name)
    assert dataclasses.asdict(read) == dataclasses.asdict(
        load(VisionConfig, repository / f"examples/models/vision/{name}.yaml")
    )

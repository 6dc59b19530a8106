"""Tiny random LLaVA models of transformers: every tower with every language model, by name "TOWER x LANGUAGE"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hf_fixtures import PIECES, write_tokenizer

from megatron_share4v.checkpoint.hf.config import parse_model_config
from megatron_share4v.config.model import ModelConfig

IMAGE_SIZE, PATCH_SIZE = 30, 14  # not a multiple, like SigLIP's 384
ROWS = 320  # <image>, <pad> and alignment after the pieces
IMAGE_TOKEN = PIECES
_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPVisionConfig", {**_TOWER, "intermediate_size": 48}),
    "siglip": ("SiglipVisionConfig", {**_TOWER, "intermediate_size": 48}),
    "dinov2": ("Dinov2Config", {**_TOWER, "mlp_ratio": 2, "layerscale_value": 0.5}),
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": IMAGE_SIZE + 6},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}
_LANGUAGE = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LANGUAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 24}}),
    "qwen2 tied": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2 untied": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "vicuna": ("LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
}
PAIRS = [f"{tower} x {language}" for tower in TOWERS for language in LANGUAGES]
_FEATURES: dict[str, dict[str, Any]] = {
    "dinov2 x qwen3": {"vision_feature_select_strategy": "full"},
    "siglip x llama3": {"vision_feature_layer": [-2, -1]},
    "dinov2 x mistral": {"vision_feature_layer": [1, -2]},
}


def build_pair(name: str) -> Any:
    """Return transformers' model of a pair in fp32, with weights so large and unlike that every mistake shows."""
    import transformers

    tower, language = name.split(" x ")
    towers, languages = TOWERS[tower], LANGUAGES[language]
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, towers[0])(**towers[1]),
        text_config=getattr(transformers, languages[0])(**{**_LANGUAGE, **languages[1]}),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        **{"vision_feature_select_strategy": "full" if tower == "siglip" else "default", **_FEATURES.get(name, {})},
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        rows = model.get_input_embeddings().weight
        rows[IMAGE_TOKEN:] *= 0.01  # as on the hub: large rows could win the argmax
        model.lm_head.weight[IMAGE_TOKEN:] *= 0.01
    return model.eval()


def model_config(model: Any) -> ModelConfig:
    """Return our configuration of a model of transformers, read from its config.json."""
    return parse_model_config(json.loads(model.config.to_json_string()), where="config.json").model


def write_pair(directory: Path, name: str) -> Any:
    """Write a pair as transformers saves it, with tokenizer and image processor; return the model."""
    model = build_pair(name)
    model.save_pretrained(directory)
    tower = name.split(" x ")[0]
    processor = {**PROCESSORS[tower], "do_rescale": True, "rescale_factor": 1 / 255}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    write_tokenizer(directory / "tokenizer.model")
    return model

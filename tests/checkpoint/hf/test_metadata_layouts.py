"""The share4v layout's files, and settings that a layout cannot express, which are refused before writing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from exported_model import MODEL
from transformers import AutoConfig

from megatron_share4v.checkpoint.hf.metadata_files import write_llava_hf_files, write_share4v_files
from megatron_share4v.config.model import ModelConfig, ProjectorConfig
from megatron_share4v.errors import ConfigError, ConversionError
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer

TOWER = "released/vision_tower"
SHARE4V_7B_CONFIG = {
    "architectures": ["Share4VLlamaForCausalLM"],
    "model_type": "share4v",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": TOWER,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "tune_entire_model": False,
    "tune_mm_mlp_adapter": False,
    "tune_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vision_tower_lr": None,
    "vocab_size": 32000,
}


def test_official_layout(tokenizer_path: Path, tmp_path: Path):
    write_share4v_files(
        tmp_path,
        model=ModelConfig(),
        tokenizer=SentencePieceTokenizer(tokenizer_path),
        tower_folder="vision_tower",
        tower_name=TOWER,
        image_aspect_ratio="pad",
        dtype="bf16",
    )
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vision_tower/config.json",
        "vision_tower/preprocessor_config.json",
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == SHARE4V_7B_CONFIG
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["legacy"], config["padding_side"], config["pad_token"], config["tokenizer_class"]) == (
        False,
        "right",
        "<unk>",
        "LlamaTokenizer",
    )
    clip = AutoConfig.from_pretrained(tmp_path / "vision_tower", local_files_only=True)
    assert (clip.num_hidden_layers, clip.hidden_size, clip.image_size, clip.hidden_act) == (24, 1024, 336, "quick_gelu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, ConversionError, "image_aspect_ratio 'anyres'"),
        ({"template": "v1_mmtag"}, ConversionError, "'v1_mmtag'.*layout share4v"),
        ({"template": "vicuna_v2"}, ConfigError, "nearest is 'vicuna_v"),
        (
            {"model": replace(MODEL, projector=ProjectorConfig(type="linear"))},
            ConversionError,
            "model.projector.type linear",
        ),
        (
            {"model": replace(MODEL, language=replace(MODEL.language, vocab_size=400))},
            ConversionError,
            "440 pieces.*too small",
        ),
    ],
)
def test_unsupported_llava_hf_settings_are_refused_before_writing(
    tokenizer_path: Path, tmp_path: Path, changes: dict, error: type, message: str
):
    options = {
        "model": MODEL,
        "tokenizer": SentencePieceTokenizer(tokenizer_path),
        "template": "vicuna_v1",
        "image_aspect_ratio": "pad",
        "dtype": "fp32",
    } | changes
    with pytest.raises(error, match=message):
        write_llava_hf_files(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"model": replace(MODEL, language=replace(MODEL.language, vocab_size=400))}, "440 pieces.*too small"),
    ],
)
def test_unsupported_share4v_settings_are_refused_before_writing(
    tokenizer_path: Path, tmp_path: Path, changes: dict, message: str
):
    options = {
        "model": MODEL,
        "tokenizer": SentencePieceTokenizer(tokenizer_path),
        "tower_folder": "clip",
        "tower_name": "Lin-Chen/tower",
        "image_aspect_ratio": "pad",
        "dtype": "fp32",
    } | changes
    with pytest.raises(ConversionError, match=message):
        write_share4v_files(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

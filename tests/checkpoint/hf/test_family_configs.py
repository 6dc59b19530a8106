"""Configurations of every family: transformers' own are read with its defaults, written ones mean the same to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_share4v.checkpoint.hf.config import parse_model_config
from megatron_share4v.checkpoint.hf.text_config import parse_text_config, to_text_config
from megatron_share4v.checkpoint.hf.vision_config import parse_vision_config, to_vision_config
from megatron_share4v.config.model import LanguageConfig, RopeScalingConfig, VisionConfig
from megatron_share4v.errors import ConversionError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LANGUAGES: dict[str, tuple[str, dict[str, Any], LanguageConfig]] = {
    "llama": (
        "LlamaConfig",
        {},
        LanguageConfig(max_position_embeddings=2048, rms_norm_eps=1e-6),
    ),
    "llama 3.1": (
        "LlamaConfig",
        {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}, "num_key_value_heads": 8, "vocab_size": 128256},
        LanguageConfig(
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            num_key_value_heads=8,
            vocab_size=128256,
            rope_theta=500000.0,
            rope_scaling=RopeScalingConfig(**LLAMA3),
        ),
    ),
    "llama with biases": (
        "LlamaConfig",
        {"attention_bias": True, "head_dim": 64, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        LanguageConfig(
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            head_dim=64,
            qkv_bias=True,
            out_bias=True,
            rope_scaling=RopeScalingConfig(rope_type="linear", factor=2.0),
        ),
    ),
    "qwen2": (
        "Qwen2Config",
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        LanguageConfig(
            model_type="qwen2",
            vocab_size=151936,
            intermediate_size=22016,
            num_key_value_heads=2,
            qkv_bias=True,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
        ),
    ),
    "qwen3": (
        "Qwen3Config",
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8},
        LanguageConfig(
            model_type="qwen3",
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=22016,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            qk_norm=True,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
        ),
    ),
    "mistral": (
        "MistralConfig",
        {"sliding_window": None},
        LanguageConfig(
            model_type="mistral",
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-6,
        ),
    ),
}


def _reference(name: str) -> Any:
    import transformers

    config, values, _ = LANGUAGES[name]
    return getattr(transformers, config)(**values)


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_language_model_is_read_with_transformers_defaults(name: str) -> None:
    """The whole configuration, and the differences from the defaults, which is what transformers 4 writes."""
    expected = LANGUAGES[name][2]
    for described in (
        _reference(name).to_dict(),
        {**_reference(name).to_diff_dict(), "model_type": expected.model_type},
    ):
        described = {**described, "sliding_window": None} if expected.model_type == "mistral" else described
        assert parse_text_config(described, where="config.json") == expected


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_written_text_config_means_the_same_to_transformers(name: str) -> None:
    """Written in the form of transformers 4, which ignores rope_parameters."""
    import transformers

    reference, converted = _reference(name), LANGUAGES[name][2]
    written = to_text_config(converted, vocab_size=converted.vocab_size, init_std=0.02)
    assert written["rope_theta"] == converted.rope_theta and "rope_parameters" not in written
    read = getattr(transformers, LANGUAGES[name][0]).from_dict(dict(written)).to_dict()
    expected = reference.to_dict()
    expected["rope_parameters"].setdefault("rope_theta", 10000.0)
    left_out = {"architectures", "transformers_version", "bos_token_id", "eos_token_id", "layer_types"}
    different = {key for key in expected if key not in left_out and expected[key] != read[key]}
    assert not different, {key: (expected[key], read[key]) for key in different}
    assert parse_text_config(written, where="config.json") == converted


def test_absent_and_null_windows_differ() -> None:
    base = {"model_type": "mistral", "max_position_embeddings": 32768}
    with pytest.raises(
        ConversionError, match=r"sliding_window 4096 \(that of mistral when the key is absent\) is below"
    ):
        parse_text_config(base, where="config.json")
    assert parse_text_config({**base, "sliding_window": None}, where="config.json").max_position_embeddings == 32768
    assert parse_text_config({**base, "max_position_embeddings": 4096}, where="config.json")
    qwen = {"model_type": "qwen2", "sliding_window": 4096, "num_hidden_layers": 30}
    assert parse_text_config(qwen, where="config.json").num_layers == 30
    assert parse_text_config({**qwen, "use_sliding_window": True, "max_window_layers": 30}, where="config.json")


TEXT_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    "M-RoPE": ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "rope_type 'mrope'"),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "differs by layer"),
    "llama3 without its numbers": ({"rope_scaling": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor, high"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "window": ({"model_type": "mistral", "sliding_window": 1024}, "sliding_window 1024 is below max_position"),
    "switched window": (
        {"model_type": "qwen2", "use_sliding_window": True},
        r"sliding_window 4096 \(that of qwen2 when the key is absent\) is below",
    ),
    "windowed layers": (
        {"model_type": "qwen3", "use_sliding_window": True, "num_hidden_layers": 2, "sliding_window": 64,
         "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window 64 is below",
    ),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quantised weights"),
    "mixtral": ({"model_type": "mixtral"}, "mixtral.*mixture of experts"),
    "qwen2_moe": ({"model_type": "qwen2_moe"}, "qwen2_moe.*mixture of experts"),
    "qwen3_moe": ({"model_type": "qwen3_moe"}, "qwen3_moe.*mixture of experts"),
    "gemma2": ({"model_type": "gemma2"}, "gemma2.*soft caps"),
    "gemma3_text": ({"model_type": "gemma3_text"}, "gemma3_text.*soft caps"),
    "phi3": ({"model_type": "phi3"}, "phi3.*fused query, key and value"),
    "qwen2_vl": ({"model_type": "qwen2_vl"}, "qwen2_vl.*M-RoPE"),
    "qwen2_5_vl": ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl.*M-RoPE"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias is True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
}  # fmt: skip
TOWER_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "NaFlex": ({"model_type": "siglip2_vision_model"}, "siglip2_vision_model.*NaFlex"),
    "EVA": ({"model_type": "eva_clip"}, "eva_clip.*EVA"),
    "SwiGLU": ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
    "no biases": ({"model_type": "dinov2", "qkv_bias": False}, "qkv_bias is False"),
    "registers": ({"model_type": "dinov2_with_registers"}, "register tokens"),
    "grey": ({"model_type": "clip_vision_model", "num_channels": 1}, "num_channels is 1"),
    "activation": ({"model_type": "siglip_vision_model", "hidden_act": "relu"}, "hidden_act is 'relu'"),
    "quantised": ({"model_type": "siglip_vision_model", "quantization_config": {}}, "quantization_config"),
}


@pytest.mark.parametrize("case", TEXT_REFUSALS)
def test_language_models_that_are_not_built_are_refused(case: str) -> None:
    config, message = TEXT_REFUSALS[case]
    for whole in (config, {"model_type": "llava", "text_config": config}):
        with pytest.raises(ConversionError, match=f"config.json.*{message}"):
            parse_model_config({"model_type": "llama", **whole}, where="config.json")


@pytest.mark.parametrize("case", TOWER_REFUSALS)
def test_towers_that_are_not_built_are_refused(case: str) -> None:
    config, message = TOWER_REFUSALS[case]
    with pytest.raises(ConversionError, match=f"config.json.*{message}"):
        parse_vision_config(config, where="config.json")
    whole = {"model_type": "llava", "text_config": {}, "vision_config": config}
    with pytest.raises(ConversionError, match=f"config.json: vision_config.*{message}"):
        parse_model_config({**whole, "vision_feature_select_strategy": "full"}, where="config.json")


HALVES, IMAGENET = (0.5, 0.5, 0.5), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TOWERS: dict[str, tuple[str, dict[str, Any], VisionConfig]] = {
    "clip": (
        "CLIPVisionConfig",
        {},
        VisionConfig(
            image_size=224,
            patch_size=32,
            hidden_size=768,
            intermediate_size=3072,
            num_layers=12,
            num_attention_heads=12,
        ),
    ),
    "siglip": (
        "SiglipVisionConfig",
        {"patch_size": 14, "image_size": 384, "intermediate_size": 4304, "hidden_size": 1152},
        VisionConfig(
            model_type="siglip_vision_model",
            image_size=384,
            patch_size=14,
            hidden_size=1152,
            intermediate_size=4304,
            num_layers=12,
            num_attention_heads=12,
            layer_norm_eps=1e-6,
            feature_select="full",
            class_token=False,
            patch_bias=True,
            pre_norm=False,
            activation="gelu_tanh",
            image_mean=HALVES,
            image_std=HALVES,
            resize="square",
        ),
    ),
    "dinov2": (
        "Dinov2Config",
        {"image_size": 518},
        VisionConfig(
            model_type="dinov2",
            image_size=518,
            patch_size=14,
            hidden_size=768,
            intermediate_size=3072,
            num_layers=12,
            num_attention_heads=12,
            layer_norm_eps=1e-6,
            patch_bias=True,
            pre_norm=False,
            layer_scale=True,
            activation="gelu",
            image_mean=IMAGENET[0],
            image_std=IMAGENET[1],
        ),
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_read_with_transformers_defaults_and_written_back(name: str) -> None:
    import transformers

    config, values, expected = TOWERS[name]
    reference = getattr(transformers, config)(**values)
    for described in (reference.to_dict(), {**reference.to_diff_dict(), "model_type": expected.model_type}):
        assert parse_vision_config(described, where="config.json") == expected
    written = to_vision_config(expected)
    read = getattr(transformers, config).from_dict(dict(written)).to_dict()
    different = {key for key, value in reference.to_dict().items() if key in written and read[key] != value}
    assert different <= {"projection_dim"}


def test_whole_models_describe_their_tower() -> None:
    import transformers

    siglip = transformers.SiglipConfig(vision_config={"image_size": 384}).to_dict()
    assert parse_vision_config(siglip, where="config.json").image_size == 384
    clip = transformers.CLIPConfig(vision_config={"patch_size": 14}).to_dict()
    assert parse_vision_config(clip, where="config.json").patch_size == 14


def test_the_features_of_a_llava() -> None:
    """Layer as an integer or a list, and which positions; a tower without class token needs all."""
    dinov2 = {"model_type": "dinov2"}
    whole: dict[str, Any] = {"model_type": "llava", "text_config": {}, "vision_config": dinov2}
    assert parse_model_config(whole, where="c").model.vision.feature_layer == -2
    described = {**whole, "vision_feature_layer": [-2, 3], "vision_feature_select_strategy": "full"}
    vision = parse_model_config(described, where="c").model.vision
    assert vision.feature_layers == (11, 3) and vision.feature_select == "full"
    assert vision.num_features == vision.num_patches + 1
    siglip = {**whole, "vision_config": {"model_type": "siglip_vision_model"}}
    with pytest.raises(ConversionError, match="'default' leaves out the first position"):
        parse_model_config(siglip, where="c")
    with pytest.raises(ConversionError, match="multimodal_projector_bias is False"):
        parse_model_config({**whole, "multimodal_projector_bias": False}, where="c")


@pytest.mark.parametrize(
    ("whole", "text", "tied"), [(True, None, True), (None, True, True), (False, True, True), (None, None, False)]
)
def test_tied_embeddings_are_stated_in_two_places(whole: bool | None, text: bool | None, tied: bool) -> None:
    config: dict[str, Any] = {"model_type": "llava", "text_config": {"model_type": "qwen2"}, "vision_config": {}}
    if whole is not None:
        config["tie_word_embeddings"] = whole
    if text is not None:
        config["text_config"]["tie_word_embeddings"] = text
    assert parse_model_config(config, where="c").model.language.tie_word_embeddings is tied


def test_contradicting_ties_are_refused() -> None:
    text = {"model_type": "qwen2", "tie_word_embeddings": False}
    with pytest.raises(ConversionError, match="make them equal"):
        parse_model_config({"model_type": "llava", "text_config": text, "tie_word_embeddings": True}, where="c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', not a mapping"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling: factor is '8', not a number"),
        ({"rope_parameters": {**LLAMA3, "rope_type": None}}, "rope_parameters has factor 8.0, .* without a rope_type"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, r"rope_type \['llama3'\] is not supported"),
        ({"rope_theta": 0}, "rope_theta: Input should be greater than 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6', not a number"),
        ({"head_dim": 0}, "head_dim: Input should be greater than 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: Input should be greater than 0"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings is '4096', not an integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"attention_bias": "true"}, "attention_bias is 'true', not true or false"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            "layer_types names 1 layers, num_hidden_layers is 32",
        ),
        ({"model_type": "llava", "text_config": [1]}, r"text_config is \[1\], not a mapping"),
        ({"model_type": "llava", "text_config": {}, "vision_config": [1]}, r"vision_config is \[1\], not a mapping"),
        ({"model_type": "llava", "text_config": {}, "image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
    ],
)
def test_values_of_another_type_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=f"config.json: .*{message}"):
        parse_model_config({"model_type": "qwen2", **change}, where="config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": True}, r"out_bias False cannot be exported: a model of model_type llama has True"),
        ({"model_type": "qwen2"}, r"qkv_bias False cannot be exported: .* qwen2 has True"),
        ({"qk_norm": True}, "qk_norm True cannot be exported"),
        ({"model_type": "mistral", "out_bias": True}, "out_bias True cannot be exported"),
    ],
)
def test_a_model_that_its_family_cannot_express_is_not_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        to_text_config(replace(LanguageConfig(), **change), vocab_size=32000, init_std=0.02)


def test_a_tower_that_its_family_cannot_express_is_not_written() -> None:
    with pytest.raises(ConversionError, match="model.vision.layer_scale True cannot be exported"):
        to_vision_config(replace(VisionConfig(), layer_scale=True))
    with pytest.raises(ConversionError, match="intermediate_size 3000 cannot be exported"):
        to_vision_config(replace(TOWERS["dinov2"][2], intermediate_size=3000))

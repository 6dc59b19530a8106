"""Parse config.json of llava-hf, ShareGPT4V/LLaVA and LLaMA models into a model configuration; refuse unsupported keys.

Knows no weights. Defaults are those of transformers' LlamaConfig, CLIPVisionConfig and LlavaConfig: transformers writes
only values that differ from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_share4v.config.base import ConflictError
from megatron_share4v.config.model import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_share4v.errors import ConversionError

CONFIG = "config.json"
Kind = Literal["llava-hf", "share4v", "llama"]
AspectRatio = Literal["square", "pad"]
Json = Mapping[str, Any]

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
LLAMA_REST = {"vocab_size": 32000, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
LLAVA_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAVA_TOWER |= {"image_size": 336, "patch_size": 14}

# Keys that change the computation, with the supported values; an absent or null key has the first one.
LANGUAGE_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
}
VISION_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("quick_gelu",)}
LLAVA_ONLY: dict[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default",),
    "tie_word_embeddings": (False,),
}
TOWER_TRAINED = ("tune_entire_model", "tune_vision_tower", "unfreeze_mm_vision_tower")
"""share4v: keys that are true when training changed the tower, whose start `mm_vision_tower` names."""
SHARE4V_ONLY: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "image_aspect_ratio": ("square", "pad"),
}


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """Content of a config.json; without a vision tower in the model, `model.vision` is to be replaced."""

    kind: Kind
    model: ModelConfig
    image_aspect_ratio: AspectRatio | None = None
    image_token: int | None = None
    """llava-hf: token id of image positions."""
    tower: str | None = None
    """share4v: path or hub name of the vision tower that the model was trained with."""
    tower_trained: str | None = None
    """share4v: the key that says that training changed the tower, so that `tower` is only its start."""


def parse_model_config(config: Json, *, where: str) -> HfConfig:
    """Parse the config.json of a model. Raises ConversionError naming a key with an unsupported value."""
    kind = _kind_of(config, where)
    try:
        if kind == "llava-hf":
            return _read_llava_hf(config, where)
        language = _language(config, where)
        if kind == "llama":
            return HfConfig(kind=kind, model=ModelConfig(language=language))
        _refuse_unsupported(config, SHARE4V_ONLY, where)
        vision = VisionConfig(feature_layer=config.get("mm_vision_select_layer", -2))
        projector = ProjectorConfig(type=config.get("mm_projector_type") or "linear")
        model = ModelConfig(vision=vision, language=language, projector=projector)
        tower = config.get("mm_vision_tower") or config.get("vision_tower")
        return HfConfig(
            kind=kind,
            model=model,
            image_aspect_ratio=config.get("image_aspect_ratio") or "square",
            tower=tower,
            tower_trained=next((key for key in TOWER_TRAINED if config.get(key)), None),
        )
    except (ConflictError, ValueError) as error:
        raise ConversionError(f"{where}: {error}") from error


def parse_vision_config(config: Json, *, feature_layer: int | tuple[int, ...], where: str) -> VisionConfig:
    """Parse the config.json of a CLIP model as a vision tower. Raises ConversionError."""
    if config.get("model_type") == "clip":
        config = config.get("vision_config") or {}
    elif config.get("model_type") != "clip_vision_model":
        raise ConversionError(
            f"{where}: model_type {config.get('model_type')!r} is no CLIP ViT; give the directory of a CLIPVisionModel"
        )
    return _vision(config, CLIP, feature_layer=feature_layer, where=where)


def _kind_of(config: Json, where: str) -> Kind:
    architectures = config.get("architectures") or []
    if config.get("model_type") == "llava" and "text_config" in config:
        return "llava-hf"
    originals = {"Share4VLlamaForCausalLM", "LlavaLlamaForCausalLM"}
    if config.get("model_type") in ("share4v", "llava", "llava_llama") or originals.intersection(architectures):
        return "share4v"
    if config.get("model_type") == "llama":
        return "llama"
    raise ConversionError(
        f"{where}: foreign architecture: model_type {config.get('model_type')!r}, architectures {architectures}; "
        "llava (transformers), share4v, llava_llama and llama can be imported"
    )


def _read_llava_hf(config: Json, where: str) -> HfConfig:
    _refuse_unsupported(config, LLAVA_ONLY, where)
    text, layer = config.get("text_config") or {}, config.get("vision_feature_layer", -2)
    if text.get("model_type", "llama") != "llama":
        raise ConversionError(f"{where}: text_config.model_type {text['model_type']!r}; only llama is supported")
    tower = config.get("vision_config") or {}
    if tower.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise ConversionError(
            f"{where}: vision_config.model_type {tower['model_type']!r}; only clip_vision_model is supported"
        )
    vision = _vision(tower, CLIP if tower else LLAVA_TOWER, feature_layer=layer, where=f"{where}: vision_config")
    model = ModelConfig(
        vision=vision, language=_language(text, f"{where}: text_config"), projector=ProjectorConfig(type="mlp2x_gelu")
    )
    token = config.get("image_token_index", config.get("image_token_id", 32000))
    return HfConfig(
        kind="llava-hf", model=model, image_aspect_ratio=config.get("image_aspect_ratio"), image_token=token
    )


def _language(config: Json, where: str) -> LanguageConfig:
    _refuse_unsupported(config, LANGUAGE_ONLY, where)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConversionError(f"{where}: rope_parameters.rope_type {rope['rope_type']!r}; only default is supported")
    size = {**LLAMA, **LLAMA_REST, **{key: value for key, value in config.items() if value is not None}}
    head = size["hidden_size"] // size["num_attention_heads"]
    if size.get("head_dim", head) != head:
        raise ConversionError(
            f"{where}: head_dim {size['head_dim']} is not hidden_size / num_attention_heads = {head}, which is required"
        )
    return LanguageConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_layers=size["num_hidden_layers"],
        num_attention_heads=size["num_attention_heads"],
        num_key_value_heads=size.get("num_key_value_heads", size["num_attention_heads"]),
        max_position_embeddings=size["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", size["rope_theta"])),
        rms_norm_eps=size["rms_norm_eps"],
    )


def _vision(
    config: Json, defaults: Mapping[str, int], *, feature_layer: int | tuple[int, ...], where: str
) -> VisionConfig:
    _refuse_unsupported(config, VISION_ONLY, where)
    if not isinstance(feature_layer, int):
        raise ConversionError(f"{where}: features of the layers {feature_layer}; only one layer is supported")
    size = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    vision = VisionConfig(
        image_size=size["image_size"],
        patch_size=size["patch_size"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_layers=size["num_hidden_layers"],
        num_attention_heads=size["num_attention_heads"],
        layer_norm_eps=size.get("layer_norm_eps", 1e-5),
    )
    return replace(vision, feature_layer=feature_layer)


def _refuse_unsupported(config: Json, allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    problems = list(_unsupported(config, allowed))
    if problems:
        raise ConversionError(f"{where}: foreign architecture: {'; '.join(problems)}")


def _unsupported(config: Json, allowed: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    for key, values in allowed.items():
        value = config.get(key)
        if value is not None and value not in values:
            yield f"{key} is {value!r}, supported is {' or '.join(repr(value) for value in values)}"

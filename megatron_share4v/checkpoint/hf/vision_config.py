"""Read and write the `vision_config` of a vision tower, without its image processor (image_processor.py)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from megatron_share4v.checkpoint.hf.families import TOWER_FAMILIES, WHOLE_MODELS, TowerFamily
from megatron_share4v.checkpoint.hf.supported_keys import (
    MAPPING,
    NUMBER,
    Json,
    describe_invalid,
    refuse_model_type,
    refuse_unsupported,
    refuse_wrong_types,
)
from megatron_share4v.config.base import ConflictError
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.errors import ConversionError

_ACTIVATIONS: dict[str, Literal["quick_gelu", "gelu", "gelu_tanh"]] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_NAMES = {name: key for key, name in _ACTIVATIONS.items()}
# The file of a whole LLaVA without a vision_config has this tower.
LLAVA_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAVA_TOWER |= {"image_size": 336, "patch_size": 14}
_PROJECTION_DIM = 768
"""CLIP's width of the projected output, which is not used."""
_COMPARED = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_attention_heads",
             "layer_norm_eps", "activation", "class_token", "patch_bias", "pre_norm", "layer_scale")  # fmt: skip


def parse_vision_config(
    config: Json, *, feature_layer: Any = -2, feature_select: Any = None, where: str
) -> VisionConfig:
    """Parse a vision tower's config.json, that of a whole CLIP or SigLIP model, or the vision_config in one.

    feature_select: `default` or `full`; None: `default` exactly where the family has a class token. The image
    processor is the family's. Raises ConversionError for what is not built.
    """
    try:
        return _parse(config, feature_layer=feature_layer, feature_select=feature_select, where=where)
    except (ConflictError, TypeError, ValueError) as error:
        raise ConversionError(f"{where}: {describe_invalid(error)}") from error


def _parse(config: Json, *, feature_layer: Any, feature_select: Any, where: str) -> VisionConfig:
    model_type = config.get("model_type", "clip_vision_model")
    refuse_wrong_types(config, {"vision_config": MAPPING, "mlp_ratio": NUMBER}, where)
    if model_type in WHOLE_MODELS:
        model_type, config = WHOLE_MODELS[model_type], config.get("vision_config") or {}
    refuse_model_type(model_type, known=[*TOWER_FAMILIES, *WHOLE_MODELS], where=where, what="a vision tower")
    family = TOWER_FAMILIES[model_type]
    size = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    only = {"hidden_act": (family.defaults["hidden_act"], *_ACTIVATIONS), "num_channels": (3,), **family.only}
    refuse_unsupported(config, only, where)
    layer = tuple(feature_layer) if isinstance(feature_layer, list) else feature_layer
    has_class_token = family.fields["class_token"]
    if feature_select == "default" and not has_class_token:
        raise ConversionError(
            f"{where}: vision_feature_select_strategy 'default' leaves out the first position, which in a tower of "
            f"model_type {model_type} is a patch, not a class token; with 'full' it has all patches"
        )
    return VisionConfig(
        model_type=model_type,
        image_size=size["image_size"],
        patch_size=size["patch_size"],
        hidden_size=size["hidden_size"],
        intermediate_size=_intermediate_size(size, where),
        num_layers=size["num_hidden_layers"],
        num_attention_heads=size["num_attention_heads"],
        layer_norm_eps=size["layer_norm_eps"],
        feature_layer=layer,
        feature_select=feature_select or ("default" if has_class_token else "full"),
        activation=_ACTIVATIONS[size["hidden_act"]],
        **family.fields,
        **family.image,
    )


def to_vision_config(vision: VisionConfig, *, has_optional: bool = True) -> dict[str, Any]:
    """Return the vision_config of a tower; has_optional: whether its file has the family's optional weights.

    Raises ConversionError when the family cannot have a field's value.
    """
    family = TOWER_FAMILIES[vision.model_type]
    config = {
        "model_type": family.model_type,
        "hidden_size": vision.hidden_size,
        **_mlp_size(vision, family),
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "hidden_act": _NAMES[vision.activation],
    }
    if family.optional_key is not None:
        config[family.optional_key] = has_optional
    if family.inner and family.optional_key is None:
        config["projection_dim"] = _PROJECTION_DIM
    read = parse_vision_config(config, where="the exported vision_config")
    for field in fields(vision):
        here, there = getattr(vision, field.name), getattr(read, field.name)
        if here != there and field.name in _COMPARED:
            raise ConversionError(
                f"model.vision.{field.name} {here} cannot be exported: a tower of model_type {family.model_type} has "
                f"{there}"
            )
    return config


def _intermediate_size(size: Json, where: str) -> int:
    if "mlp_ratio" not in size:
        return size["intermediate_size"]
    width = size["hidden_size"] * size["mlp_ratio"]
    if width != int(width):
        raise ConversionError(f"{where}: mlp_ratio {size['mlp_ratio']} of hidden_size {size['hidden_size']} is {width}")
    return int(width)


def _mlp_size(vision: VisionConfig, family: TowerFamily) -> dict[str, int]:
    if "mlp_ratio" not in family.defaults:
        return {"intermediate_size": vision.intermediate_size}
    return {"mlp_ratio": vision.intermediate_size // vision.hidden_size}

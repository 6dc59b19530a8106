"""Read and write the `text_config` of a language model: sizes, biases, rotation, windows, tied embeddings.

Absent keys have the family's defaults of transformers; an absent `rope_theta` is 10000 in every family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron_share4v.checkpoint.hf.families import LANGUAGE_FAMILIES, LanguageFamily
from megatron_share4v.checkpoint.hf.supported_keys import (
    BOOLEAN,
    INTEGER,
    LIST,
    MAPPING,
    NUMBER,
    Json,
    refuse_model_type,
    refuse_unsupported,
    refuse_wrong_types,
)
from megatron_share4v.config.model import LanguageConfig, RopeScalingConfig
from megatron_share4v.errors import ConversionError

_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "partial_rotary_factor": (1.0,)}
_ROPE_THETA = 10000.0
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported kinds of rotary scaling and the values that each needs."""
_ROPE_TYPES = dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), NUMBER) | {
    "original_max_position_embeddings": INTEGER
}
_SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
_SIZES += ["num_key_value_heads", "max_position_embeddings", "sliding_window", "max_window_layers"]
_TYPES = {
    **dict.fromkeys(_SIZES, INTEGER),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_sliding_window"), BOOLEAN),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), MAPPING),
    "layer_types": LIST,
}
_NOT_WRITTEN = ("vocab_size", "vocab_multiple")


def parse_text_config(config: Json, *, where: str) -> LanguageConfig:
    """Parse a language model's config.json, or the text_config in one. Raises ConversionError for what is not built."""
    model_type = config.get("model_type", "llama")
    refuse_model_type(model_type, known=LANGUAGE_FAMILIES, where=where, what="a language model")
    family = LANGUAGE_FAMILIES[model_type]
    refuse_wrong_types(config, _TYPES, where)
    refuse_unsupported(config, _ONLY | dict(family.only), where)
    size = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    _refuse_window(config, size, family, where)
    heads, width = size["num_attention_heads"], size["hidden_size"]
    keys = config.get("num_key_value_heads", size.get("num_key_value_heads"))
    bias = bool(family.bias_key and config.get(family.bias_key))
    theta, scaling = _parse_rope(config, size, where)
    head_dim = size.get("head_dim") if "head_dim" not in config else config["head_dim"]
    return LanguageConfig(
        model_type=model_type,
        vocab_size=size["vocab_size"],
        hidden_size=width,
        intermediate_size=size["intermediate_size"],
        num_layers=size["num_hidden_layers"],
        num_attention_heads=heads,
        # transformers takes null, unlike an absent key, for as many as queries.
        num_key_value_heads=heads if keys is None else keys,
        head_dim=None if head_dim is None or head_dim * heads == width else head_dim,
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        max_position_embeddings=size["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=size["rms_norm_eps"],
        **{"qkv_bias": bias, "out_bias": bias, **family.fields},
    )


def to_text_config(language: LanguageConfig, *, vocab_size: int, init_std: float) -> dict[str, Any]:
    """Return the text_config of a language model, in the spelling that transformers 4 and 5 read, without token ids.

    Raises ConversionError when the family cannot have a field's value.
    """
    family = LANGUAGE_FAMILIES[language.model_type]
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.rms_norm_eps,
        # transformers 5 reads these flat keys too; transformers 4 ignores `rope_parameters`.
        "rope_theta": language.rope_theta,
        "rope_scaling": _rope_scaling(language.rope_scaling),
        "hidden_act": "silu",
        "initializer_range": init_std,
        "use_cache": True,
        "tie_word_embeddings": language.tie_word_embeddings,
    }
    if language.head_dim is not None or "head_dim" in family.defaults:
        config["head_dim"] = language.attention_head_dim
    if family.bias_key is not None:
        config[family.bias_key] = language.qkv_bias
    if family.window is not None:
        config |= {"sliding_window": None} | ({"use_sliding_window": False} if family.window == "switched" else {})
    read = parse_text_config(config, where="the exported text_config")
    for field in fields(language):
        here, there = getattr(language, field.name), getattr(read, field.name)
        if here != there and field.name not in (*_NOT_WRITTEN, "head_dim"):
            raise ConversionError(
                f"model.language.{field.name} {here} cannot be exported: a model of model_type {family.model_type} has "
                f"{there}"
            )
    return config


def _parse_rope(config: Json, size: Json, where: str) -> tuple[float, RopeScalingConfig]:
    """Return theta and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ConversionError(f"{where}: {name} differs by layer ({', '.join(nested)}), which is not supported")
    refuse_wrong_types(rope, _ROPE_TYPES, f"{where}: {name}")
    stated_thetas = (rope.get("rope_theta"), config.get("rope_theta"), _parameters_theta(config))
    theta = float(next((value for value in stated_thetas if value is not None), _ROPE_THETA))
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    if "mrope_section" in rope:
        kind = "mrope"
    if kind == "default" and rope.get("factor") not in (None, 1):
        raise ConversionError(
            f"{where}: {name} has factor {rope['factor']}, which has no effect without a rope_type; state the type "
            f"({' or '.join(key for key in _ROPE_KEYS if key != kind)}), or leave the factor out"
        )
    if kind not in tuple(_ROPE_KEYS):
        raise ConversionError(
            f"{where}: foreign architecture: {name} of rope_type {kind!r} is not supported; "
            f"supported are {', '.join(_ROPE_KEYS)}"
        )
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConversionError(
            f"{where}: {name}.partial_rotary_factor {rope['partial_rotary_factor']}: only whole heads are rotated"
        )
    # transformers takes the model's length for the original one where the file does not state it.
    stated = {"original_max_position_embeddings": size["max_position_embeddings"], **rope}
    missing = [key for key in _ROPE_KEYS[kind] if stated.get(key) is None]
    if missing:
        raise ConversionError(f"{where}: {name} of rope_type {kind} lacks {', '.join(missing)}")
    return theta, RopeScalingConfig(rope_type=kind, **{key: _number(key, stated[key]) for key in _ROPE_KEYS[kind]})


def _parameters_theta(config: Json) -> float | None:
    return (config.get("rope_parameters") or {}).get("rope_theta")


def _number(key: str, value: Any) -> Any:
    return value if key.startswith("original") else float(value)


def _rope_scaling(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    if scaling.rope_type == "default":
        return None
    return {
        "rope_type": scaling.rope_type,
        **{key: getattr(scaling, key) for key in _ROPE_KEYS[scaling.rope_type]},
    }


def _refuse_window(config: Json, size: Json, family: LanguageFamily, where: str) -> None:
    """Refuse attention over a window that is shorter than the longest sequence; absent and null differ."""
    window = config["sliding_window"] if "sliding_window" in config else family.defaults.get("sliding_window")
    longest = size["max_position_embeddings"]
    if window is None or window >= longest or not any(_windowed_layers(config, size, family, where)):
        return
    stated = "" if "sliding_window" in config else f" (that of {family.model_type} when the key is absent)"
    raise ConversionError(
        f"{where}: foreign architecture: sliding_window {window}{stated} is below max_position_embeddings {longest}: "
        'attention over a window is not built; use a model with "sliding_window": null, or set max_position_embeddings '
        f"to {window} if no longer sequence is needed"
    )


def _windowed_layers(config: Json, size: Json, family: LanguageFamily, where: str) -> Iterator[bool]:
    if family.window is None or (family.window == "switched" and not config.get("use_sliding_window")):
        return
    kinds = config.get("layer_types") if family.window == "switched" else None
    if kinds and len(kinds) != size["num_hidden_layers"]:
        raise ConversionError(
            f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is {size['num_hidden_layers']}"
        )
    first = size["max_window_layers"] if family.window == "switched" else 0
    for number in range(size["num_hidden_layers"]):
        yield kinds[number] == "sliding_attention" if kinds else number >= first

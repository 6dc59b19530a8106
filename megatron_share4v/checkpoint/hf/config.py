"""Parse config.json of llava-hf, ShareGPT4V/LLaVA and language models into a model configuration; refuse unsupported
keys.

Knows no weights. transformers writes only values that differ from its defaults, so absent keys have those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_share4v.checkpoint.hf.families import LANGUAGE_FAMILIES
from megatron_share4v.checkpoint.hf.supported_keys import (
    BOOLEAN,
    INTEGER,
    MAPPING,
    Json,
    Supported,
    describe_invalid,
    refuse_model_type,
    refuse_unsupported,
    refuse_wrong_types,
)
from megatron_share4v.checkpoint.hf.text_config import parse_text_config
from megatron_share4v.checkpoint.hf.vision_config import LLAVA_TOWER, parse_vision_config
from megatron_share4v.config.base import ConflictError
from megatron_share4v.config.model import ModelConfig, ProjectorConfig, VisionConfig
from megatron_share4v.errors import ConversionError

CONFIG = "config.json"
Kind = Literal["llava-hf", "share4v", "language"]
AspectRatio = Literal["square", "pad"]

LLAVA_ONLY: Supported = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default", "full"),
    "image_aspect_ratio": ("square", "pad"),
}
_LLAVA_TYPES = {"text_config": MAPPING, "vision_config": MAPPING, "tie_word_embeddings": BOOLEAN}
_LLAVA_TYPES |= {"image_token_index": INTEGER, "image_token_id": INTEGER}
TOWER_TRAINED = ("tune_entire_model", "tune_vision_tower", "unfreeze_mm_vision_tower")
"""share4v: keys that are true when training changed the tower, whose start `mm_vision_tower` names."""
_SELECT: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
SHARE4V_ONLY: Supported = {
    "mm_vision_select_feature": tuple(_SELECT),
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
        language = parse_text_config({**config, **({"model_type": "llama"} if kind == "share4v" else {})}, where=where)
        if kind == "language":
            return HfConfig(kind=kind, model=ModelConfig(language=language))
        refuse_unsupported(config, SHARE4V_ONLY, where)
        vision = VisionConfig(
            feature_layer=config.get("mm_vision_select_layer", -2),
            feature_select=_SELECT[config.get("mm_vision_select_feature") or "patch"],
        )
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
    except (ConflictError, TypeError, ValueError) as error:
        raise ConversionError(f"{where}: {describe_invalid(error)}") from error


def _kind_of(config: Json, where: str) -> Kind:
    architectures = config.get("architectures") or []
    if config.get("model_type") == "llava" and "text_config" in config:
        return "llava-hf"
    originals = {"Share4VLlamaForCausalLM", "LlavaLlamaForCausalLM"}
    if config.get("model_type") in ("share4v", "llava", "llava_llama") or originals.intersection(architectures):
        return "share4v"
    refuse_model_type(
        config.get("model_type"),
        known=("llava", "share4v", "llava_llama", *LANGUAGE_FAMILIES),
        where=where,
        what=f"a model (architectures {architectures})",
    )
    return "language"


def _read_llava_hf(config: Json, where: str) -> HfConfig:
    refuse_wrong_types(config, _LLAVA_TYPES, where)
    refuse_unsupported(config, LLAVA_ONLY, where)
    text, tower = config.get("text_config") or {}, config.get("vision_config") or {}
    vision = parse_vision_config(
        tower or LLAVA_TOWER,
        feature_layer=config.get("vision_feature_layer", -2),
        feature_select=config.get("vision_feature_select_strategy") or "default",
        where=f"{where}: vision_config",
    )
    language = parse_text_config(
        {**text, "tie_word_embeddings": _tied(config, text, where)}, where=f"{where}: text_config"
    )
    model = ModelConfig(vision=vision, language=language, projector=ProjectorConfig(type="mlp2x_gelu"))
    token = config.get("image_token_index", config.get("image_token_id", 32000))
    return HfConfig(
        kind="llava-hf", model=model, image_aspect_ratio=config.get("image_aspect_ratio"), image_token=token
    )


def _tied(config: Json, text: Json, where: str) -> bool:
    """Return whether the head is the embedding: stated by the whole, the text_config or both."""
    whole, inner = config.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if whole and inner is False:
        raise ConversionError(
            f"{where}: tie_word_embeddings is true, and text_config.tie_word_embeddings false; releases of "
            "transformers differ in which one they follow, so make them equal"
        )
    return bool(whole or inner)

"""Families of vision towers and language models as data: names, defaults and fixed properties in Hugging Face files.

The weight map and the readers and writers of configurations use these tables. A family whose layers model/ computes
already is one more entry here. Defaults are transformers': its files leave out values that equal them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_share4v.config.model import VisionConfig

Shapes = dict[str, tuple[int, ...]]


def _nothing(width: int, inner: int) -> Shapes:
    return {}


@dataclass(frozen=True, kw_only=True)
class TowerNames:
    """Tensor names of a tower after its prefix. Defaults are CLIP's; modules are without `.weight` and `.bias`."""

    class_token: str = "embeddings.class_embedding"
    position: str = "embeddings.position_embedding.weight"
    patch: str = "embeddings.patch_embedding"
    pre_norm: str = "pre_layrnorm"  # CLIP's spelling
    blocks: str = "encoder.layers."
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    out: str = "self_attn.out_proj"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    scales: tuple[str, str] = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    """Whole names of the layer scales of attention and MLP."""
    batched: bool = False
    """Whether class token and positions have leading dimensions of 1, [1, 1, W] and [1, P, W]."""


@dataclass(frozen=True, kw_only=True)
class TowerFamily:
    """Vision tower family."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    """Values of absent keys of its config.json."""
    fields: Mapping[str, Any]
    """Fields of VisionConfig that every tower of the family has."""
    image: Mapping[str, Any]
    """Fields of VisionConfig for images, where no file describes the image processor."""
    processor: str
    """Class of its image processor."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys with the values that are supported, beside those of every family."""
    inner: str = ""
    """Prefix inside the tower in published files; transformers 5 leaves it out."""
    names: TowerNames = TowerNames()
    names_in_memory: TowerNames | None = None
    """Names of transformers 5's classes, where they differ from those of the files that it writes."""
    final_norm: str = "post_layernorm"
    """LayerNorm after the last block; the selected features come before it."""
    optional: Callable[[int, int], Shapes] = _nothing
    """Weights without effect on the features that a file can lack: names and shapes by the widths of tower and MLP."""
    optional_key: str | None = None
    """Key that is false when the file lacks them."""

    def unused_shapes(self, vision: VisionConfig) -> Shapes:
        """Return the shapes of weights beside the blocks that have no effect on the features."""
        norm = {f"{self.final_norm}.{part}": (vision.hidden_size,) for part in ("weight", "bias")}
        return norm | self.optional_shapes(vision)

    def optional_shapes(self, vision: VisionConfig) -> Shapes:
        """Return the shapes of those weights that a file can lack."""
        return self.optional(vision.hidden_size, vision.intermediate_size)

    def file_name(self, name: str) -> str:
        """Return the name in files of a tensor that can have its name in memory."""
        for part in ("query", "key", "value", "out") if self.names_in_memory is not None else ():
            name = name.replace(f".{getattr(self.names_in_memory, part)}.", f".{getattr(self.names, part)}.")
        return name


_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "num_channels": 3}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALVES = (0.5, 0.5, 0.5)

CLIP_FAMILY = TowerFamily(
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    defaults=_BASE | {"intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    fields={"class_token": True, "patch_bias": False, "pre_norm": True, "layer_scale": False},
    image={"image_mean": _CLIP_MEAN, "image_std": _CLIP_STD, "resample": "bicubic", "resize": "shortest_edge"},
    processor="CLIPImageProcessor",
    inner="vision_model.",
)
SIGLIP_FAMILY = TowerFamily(
    model_type="siglip_vision_model",
    architecture="SiglipVisionModel",
    defaults=_BASE
    | {"intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    fields={"class_token": False, "patch_bias": True, "pre_norm": False, "layer_scale": False},
    image={"image_mean": _HALVES, "image_std": _HALVES, "resample": "bicubic", "resize": "square"},
    processor="SiglipImageProcessor",
    inner="vision_model.",
    optional=lambda width, inner: {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        "head.attention.out_proj.weight": (width, width),
        "head.attention.out_proj.bias": (width,),
        "head.layernorm.weight": (width,),
        "head.layernorm.bias": (width,),
        "head.mlp.fc1.weight": (inner, width),
        "head.mlp.fc1.bias": (inner,),
        "head.mlp.fc2.weight": (width, inner),
        "head.mlp.fc2.bias": (width,),
    },
    optional_key="vision_use_head",
)
_DINOV2 = TowerNames(
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    blocks="encoder.layer.",
    norms=("norm1", "norm2"),
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    batched=True,
)
DINOV2_FAMILY = TowerFamily(
    model_type="dinov2",
    architecture="Dinov2Model",
    defaults=_BASE | {"mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    fields={"class_token": True, "patch_bias": True, "pre_norm": False, "layer_scale": True},
    image={
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
        "resample": "bicubic",
        "resize": "shortest_edge",
    },
    processor="BitImageProcessor",
    only={"qkv_bias": (True,), "use_swiglu_ffn": (False,)},
    names=_DINOV2,
    names_in_memory=replace(
        _DINOV2, query="attention.q_proj", key="attention.k_proj", value="attention.v_proj", out="attention.o_proj"
    ),
    final_norm="layernorm",
    optional=lambda width, inner: {"embeddings.mask_token": (1, width)},
    optional_key="use_mask_token",
)
TOWER_FAMILIES = {family.model_type: family for family in (CLIP_FAMILY, SIGLIP_FAMILY, DINOV2_FAMILY)}
"""Families of vision towers by VisionConfig.model_type."""
WHOLE_MODELS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Models of a tower and a text encoder, whose `vision_config` describes the tower."""


@dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """Language model family. Tensor names are LLaMA's in all of them."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    """Values of absent keys of its config.json."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of LanguageConfig that every model of the family has."""
    bias_key: str | None = None
    """Key of biases on queries, keys, values and attention's output."""
    window: Literal["stated", "switched"] | None = None
    """Whether `sliding_window` applies: where it is stated, or only where `use_sliding_window` is true too."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys with the values that are supported, beside those of every family."""


_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_QWEN = _SIZES | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
LLAMA_FAMILY = LanguageFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults=_SIZES | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    bias_key="attention_bias",
    only={"mlp_bias": (False,)},
)
QWEN2_FAMILY = LanguageFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=_QWEN,
    fields={"qkv_bias": True},
    window="switched",
)
QWEN3_FAMILY = LanguageFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=_QWEN | {"head_dim": 128},
    fields={"qk_norm": True},
    bias_key="attention_bias",
    window="switched",
)
MISTRAL_FAMILY = LanguageFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults=_SIZES
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    window="stated",
)
LANGUAGE_FAMILIES = {family.model_type: family for family in (LLAMA_FAMILY, QWEN2_FAMILY, QWEN3_FAMILY, MISTRAL_FAMILY)}
"""Families of language models by LanguageConfig.model_type."""

_MOE = "it is a mixture of experts, and only dense MLPs are built"
_GEMMA = "Gemma has GeGLU, norms of (1 + weight) after attention and MLP, soft caps and alternating windows"
_PHI = "Phi has fused query, key and value and its own (long) rotary scaling"
_MROPE = "Qwen-VL's language model rotates by three coordinates (M-RoPE)"
_NAFLEX = "SigLIP 2 NaFlex takes patches of any grid with masks; use a SigLIP 2 checkpoint of fixed resolution"
_EVA = "EVA towers have queries and values with biases, keys without, and rotary positions"
REFUSED = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "deepseek_v2", "deepseek_v3"), _MOE),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("phi", "phi3", "phi4_multimodal"), _PHI),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_vl_text", "qwen2_5_vl_text"), _MROPE),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_text"), _MROPE),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), _NAFLEX),
    **dict.fromkeys(("eva_clip", "eva_vision_model", "eva02", "eva"), _EVA),
    "dinov2_with_registers": "register tokens beside the class token are not built; use a DINOv2 without registers",
    "smollm3": "SmolLM3 leaves the rotation out in some layers",
}
"""Why families that are often asked for cannot be imported, by model_type."""

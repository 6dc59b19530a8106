"""Families of vision towers as data: their tensor names in Hugging Face files.

The weight map reads these tables. A family that computes what model/ computes already is one more entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    inner: str = ""
    """Prefix inside the tower in published files; transformers 5 leaves it out."""
    names: TowerNames = TowerNames()
    names_in_memory: TowerNames | None = None
    """Names of transformers 5's classes, where they differ from those of the files that it writes."""
    final_norm: str = "post_layernorm"
    """LayerNorm after the last block; the selected features come before it."""
    optional: Callable[[int, int], Shapes] = _nothing
    """Weights without effect on the features that a file can lack: names and shapes by the widths of tower and MLP."""

    def unused_shapes(self, vision: VisionConfig) -> Shapes:
        """Return the shapes of weights beside the blocks that have no effect on the features."""
        norm = {f"{self.final_norm}.{part}": (vision.hidden_size,) for part in ("weight", "bias")}
        return norm | self.optional(vision.hidden_size, vision.intermediate_size)


CLIP_FAMILY = TowerFamily(model_type="clip_vision_model", inner="vision_model.")
SIGLIP_FAMILY = TowerFamily(
    model_type="siglip_vision_model",
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
    names=_DINOV2,
    names_in_memory=replace(
        _DINOV2, query="attention.q_proj", key="attention.k_proj", value="attention.v_proj", out="attention.o_proj"
    ),
    final_norm="layernorm",
    optional=lambda width, inner: {"embeddings.mask_token": (1, width)},
)
TOWER_FAMILIES = {family.model_type: family for family in (CLIP_FAMILY, SIGLIP_FAMILY, DINOV2_FAMILY)}
"""Families of vision towers by VisionConfig.model_type."""

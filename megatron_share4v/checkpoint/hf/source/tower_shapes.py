"""Derive the configuration of a CLIP tower that lies without one inside a ShareGPT4V or LLaVA model."""

from __future__ import annotations

from dataclasses import replace

from megatron_share4v.checkpoint.lazy_tensor import LazyTensor
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger

CLIP_HEAD = 64


def clip_tower_from_shapes(vision: VisionConfig, prefix: str, tensors: dict[str, LazyTensor]) -> VisionConfig:
    """Derive the configuration of a tower inside a model from its tensor shapes.

    The number of heads does not follow from shapes; CLIP's heads have 64 channels.
    """

    def shape(name: str) -> tuple[int, ...]:
        if f"{prefix}{name}" not in tensors:
            raise ConversionError(f"missing tensor: {prefix}{name}")
        return tensors[f"{prefix}{name}"].shape

    width, patch = shape("embeddings.class_embedding")[0], shape("embeddings.patch_embedding.weight")[-1]
    side = round((shape("embeddings.position_embedding.weight")[0] - 1) ** 0.5)
    layers = sum(
        name.startswith(f"{prefix}encoder.layers.") and name.endswith("layer_norm1.weight") for name in tensors
    )
    heads = max(1, width // CLIP_HEAD)
    get_logger().info(
        "tower inside, without configuration: %d layers of width %d found, %d heads assumed (64 channels each)",
        layers,
        width,
        heads,
    )
    return replace(
        vision,
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_layers=layers,
        num_attention_heads=heads,
    )

"""Tiny model and synthetic global batches for the distributed tests, equal at every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_share4v.config.model import (
    LanguageConfig,
    ModelConfig,
    RopeScalingConfig,
    TrainableConfig,
    VisionConfig,
)
from megatron_share4v.data.records import Batch
from megatron_share4v.data.sampling.sampler import GlobalBatch

GLOBAL_BATCH, MICRO_BATCH, LENGTH, PATCHES = 16, 2, 24, 4


def tiny_model(**trainable) -> ModelConfig:
    """Return a model of 8 decoder layers (PP 4 x VPP 2) with GQA, a padded vocabulary and a half-frozen tower."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_layers=3, num_attention_heads=4
        ),
        language=LanguageConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        ),
        trainable=TrainableConfig(**(trainable or {"vision_from_block": 1})),
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "qk_norm": {"qk_norm": True, "head_dim": 12},
    "biased": {"qkv_bias": True, "out_bias": True},
    "all": {
        "tie_word_embeddings": True,
        "qk_norm": True,
        "head_dim": 12,
        "qkv_bias": True,
        "out_bias": True,
        "rope_scaling": RopeScalingConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=16),
    },
}
"""Fields of the language model that differ between families, as changes of tiny_model's; plain has none."""


def tiny_family(name: str, **trainable) -> ModelConfig:
    """Return tiny_model with a language model of another family, of 4 layers."""
    model = tiny_model(**trainable)
    return (
        model if name == "plain" else replace(model, language=replace(model.language, num_layers=4, **FAMILIES[name]))
    )


TOWERS = {
    "clip": {},
    "siglip": {
        "model_type": "siglip_vision_model", "image_size": 19, "class_token": False, "feature_select": "full",
        "patch_bias": True, "pre_norm": False, "activation": "gelu_tanh", "layer_norm_eps": 1e-6,
        "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "resize": "square",
    },
    "dinov2": {
        "model_type": "dinov2", "patch_bias": True, "pre_norm": False, "layer_scale": True, "activation": "gelu",
        "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
"""Values of VisionConfig by family, beside the sizes."""


def with_tower(model: ModelConfig, family: str, **changes) -> ModelConfig:
    """Return `model` with a tower of another family, of the same sizes and number of features."""
    return replace(model, vision=replace(model.vision, **TOWERS[family], **changes))


def micro_batches(step: int, *, image_size: int = 16) -> list[Batch]:
    """Build all micro-batches of a global batch: with two, one and no images (the last too), one without labels."""
    generator = torch.Generator().manual_seed(step)
    result = []
    for number in range(GLOBAL_BATCH // MICRO_BATCH):
        images = (2, 1, 0, 2, 2, 1, 2, 0)[number]
        ids = torch.randint(1, 100, (MICRO_BATCH, LENGTH), generator=generator)
        slots = torch.cat(
            [torch.arange(1, 1 + PATCHES) + sample * LENGTH for sample in range(images)]
            or [torch.zeros(0, dtype=torch.int64)]
        )
        ids.view(-1)[slots] = 0
        labels = 0 if number == 4 else int(torch.randint(1, 20, (1,), generator=generator))
        result.append(
            Batch(
                token_ids=ids,
                image_slots=slots,
                pixels=torch.randint(
                    0, 256, (images, image_size, image_size, 3), generator=generator, dtype=torch.uint8
                ),
                target_rows=torch.randperm(MICRO_BATCH * LENGTH, generator=generator)[:labels].sort().values,
                targets=torch.randint(1, 100, (labels,), generator=generator),
            )
        )
    return result


def step_items(step: int) -> GlobalBatch:
    """Return the sampler's record of the same step."""
    batches = micro_batches(step)
    return GlobalBatch(
        step=step,
        rows=np.arange(GLOBAL_BATCH),
        lengths=np.full(GLOBAL_BATCH, LENGTH),
        sequence_length=LENGTH,
        images=sum(batch.pixels.size(0) for batch in batches),
        trained_tokens=sum(batch.targets.numel() for batch in batches),
    )

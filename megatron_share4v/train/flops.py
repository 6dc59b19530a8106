"""Arithmetic of one step: model FLOPs that count real tokens, real images and frozen parts, and the peak of known GPUs.

A multiply-add is two FLOPs. Recomputed activations do not count (model FLOPs, as in Megatron-LM's and PaLM's MFU).
"""

from __future__ import annotations

from megatron_share4v.config.model import ModelConfig

# Dense BF16 peak in FLOP/s by a part of the device's name (NVIDIA data sheets, without sparsity).
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """Peak of a known GPU; None otherwise, and MFU is then not reported."""
    return next((peak for part, peak in BF16_PEAK.items() if part in device_name), None)


def step_flops(model: ModelConfig, *, sequence_lengths: tuple[int, ...], images: int, trained_tokens: int) -> float:
    """Model FLOPs of one optimizer step over samples of the given real lengths (positions, image slots included, padding not)."""
    return 2.0 * (_language(model, sequence_lengths) + _head(model, trained_tokens) + images * (_tower(model) + _projector(model)))


def _products(trained: bool, anything_before: bool) -> int:
    """Matrix products per weight: forward, gradient to the input where something before it trains, gradient to the weight where it trains."""
    return 1 + int(anything_before) + int(trained)


def _language(model: ModelConfig, lengths: tuple[int, ...]) -> float:
    language, trainable = model.language, model.trainable
    head_dim = language.hidden_size // language.num_attention_heads
    weights = 2 * language.hidden_size * (language.hidden_size + language.num_key_value_heads * head_dim)
    weights += 3 * language.hidden_size * language.intermediate_size
    products = _products(trainable.language, True)
    # Causal attention: two products over half of the square; their backward has twice as many.
    attention = 3 * sum(length * length for length in lengths) * language.hidden_size
    return language.num_layers * (products * sum(lengths) * weights + attention)


def _head(model: ModelConfig, trained_tokens: int) -> float:
    language = model.language
    return _products(model.trainable.language, True) * trained_tokens * language.hidden_size * language.vocab_size


def _tower(model: ModelConfig) -> float:
    vision, start = model.vision, model.trainable.vision_from_block
    tokens = vision.num_patches + 1
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    attention = 2 * tokens * tokens * vision.hidden_size
    frozen = vision.num_built_layers if start is None else max(start, 0)
    trained = vision.num_built_layers - frozen
    patches = vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size * (2 if start == -1 else 1)
    return patches + frozen * (tokens * weights + attention) + trained * 3 * (tokens * weights + attention)


def _projector(model: ModelConfig) -> float:
    width, patches = model.language.hidden_size, model.vision.num_patches
    anything_before = model.trainable.vision_from_block is not None
    first = model.vision.hidden_size * width * _products(model.trainable.projector, anything_before)
    if model.projector.type == "linear":
        return patches * first
    return patches * (first + width * width * _products(model.trainable.projector, anything_before or model.trainable.projector))

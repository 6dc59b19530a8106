"""Model FLOPs against the usual 6 x parameters x tokens, and what freezing saves."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_share4v.config.model import ModelConfig, TrainableConfig
from megatron_share4v.train.flops import peak_flops, step_flops

LLM_7B, PROJECTOR_7B = 6_738_415_616, 20_979_712


def test_language_model_matches_six_n_d() -> None:
    """Text only, every position trained: 6 x (parameters without embedding) per token, plus causal attention."""
    model = ModelConfig(trainable=TrainableConfig(language=True))
    length, language = 2048, model.language
    matrices = LLM_7B - language.vocab_size * language.hidden_size - (2 * language.num_layers + 1) * language.hidden_size
    attention = 6 * language.num_layers * length * length * language.hidden_size
    assert step_flops(model, sequence_lengths=(length,), images=0, trained_tokens=length) == pytest.approx(6 * matrices * length + attention, rel=1e-9)


def test_a_frozen_tower_costs_a_forward_alone() -> None:
    frozen = ModelConfig(trainable=TrainableConfig(vision_from_block=None))
    half = dataclasses.replace(frozen, trainable=TrainableConfig(vision_from_block=12))

    def per_image(model: ModelConfig) -> float:
        one = step_flops(model, sequence_lengths=(600,), images=1, trained_tokens=20)
        return one - step_flops(model, sequence_lengths=(600,), images=0, trained_tokens=20)

    block = 2 * (577 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 577 * 577 * 1024)
    projector_input_gradient = 2 * 576 * 1024 * 4096
    assert per_image(half) - per_image(frozen) == pytest.approx(2 * 11 * block + projector_input_gradient, rel=1e-9)


def test_only_labelled_positions_reach_the_head() -> None:
    model = ModelConfig()
    few, many = (step_flops(model, sequence_lengths=(800,), images=1, trained_tokens=count) for count in (200, 800))
    assert many - few == pytest.approx(6 * 600 * 4096 * 32000)


def test_peak_is_known_or_none() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("some other device") is None

"""The whole model against transformers' LlavaForConditionalGeneration, tiny and random, at several layouts.

The vocabulary (99) is not a multiple of its padding, queries are grouped. What is compared: llava_reference.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_world
from llava_reference import QUANTITIES, find_differences, write_reference
from tolerances import FP32_MODULE

from megatron_share4v.config.model import LanguageConfig, ModelConfig, TrainableConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.run import Ops

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_layers=4, num_attention_heads=4
    ),
    language=LanguageConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=5000.0,
        rms_norm_eps=1e-6,
        vocab_multiple=64,
    ),
    trainable=TrainableConfig(vision_from_block=-1),
)
IMAGE_TOKEN = 98
LAYOUTS = {
    "tensor 1": ParallelConfig(),
    "tensor 2": ParallelConfig(tensor=2),
    "tensor 2, sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline 2": ParallelConfig(pipeline=2),
    "pipeline 2, virtual 2": ParallelConfig(pipeline=2, virtual=2),
    "tensor 2, sequence, pipeline 2": ParallelConfig(tensor=2, sequence=True, pipeline=2),
}


def _reference_model() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, language = MODEL.vision, MODEL.language
    tower = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.layer_norm_eps,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_key_value_heads,
        max_position_embeddings=language.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        rms_norm_eps=language.rms_norm_eps,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN)
    )
    with torch.no_grad():
        # Larger than initial weights, with norms other than one and biases other than zero, so that every mistake
        # shows.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that transformers computes, in a file."""
    return write_reference(tmp_path_factory.mktemp("llava") / "reference.pt", _reference_model(), MODEL)


@pytest.mark.parametrize(
    ("name", "ops"),
    [*((name, "auto") for name in LAYOUTS), *((name, "reference") for name in ("tensor 1", list(LAYOUTS)[-1]))],
)
def test_equals_transformers(name: str, ops: Ops, reference: Path) -> None:
    """Run with native ops where there is a compiler, and with their references."""
    parallel = LAYOUTS[name]
    found: dict[str, float] = {}
    for rank in run_world(parallel.tensor * parallel.pipeline, find_differences, reference, parallel, ops):
        for quantity, difference in rank.items():
            found[quantity] = max(found.get(quantity, 0.0), difference)
    expected = QUANTITIES if parallel.virtual == 1 else ("loss", "gradients")
    assert set(found) == set(expected)
    assert all(difference <= FP32_MODULE for difference in found.values()), found

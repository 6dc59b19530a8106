"""A small model and a tokenizer corpus for the tests of exported metadata files."""

from __future__ import annotations

from typing import Any

import torch

from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.evaluate.agreement import to_messages
from megatron_share4v.infer.session import Question
from megatron_share4v.text.template import get_template

VICUNA = get_template("vicuna_v1")
CORPUS = [
    VICUNA.system,
    "USER: What animal is this? ASSISTANT: A cat. It is sleeping on the sofa.",
    "Two dogs run. How many are there?",
    "Short questions have  short answers.   Long ones    do not.",
    "日本語 é",
]
PIECES = 440
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_layers=3, num_attention_heads=4
    ),
    language=LanguageConfig(
        vocab_size=PIECES,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=5000.0,
        rms_norm_eps=1e-6,
    ),
)


def encode_with_chat_template(processor: Any, question: Question) -> dict[str, torch.Tensor]:
    """Encode a conversation with an export's own processor and chat template."""
    messages = to_messages(question)
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

"""Small sentencepiece models with the settings and special ids of LLaMA's, and words for generated texts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

WORDS = (
    "red", "green", "blue", "circle", "square", "star", "left", "right", "above", "below", "small", "large",
    "what", "is", "the", "of", "in", "image", "there", "a", "an", "answer", "describe",
)  # fmt: skip

LLAMA_SETTINGS: Mapping[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "hard_vocab_limit": False,
    "num_threads": 1,
    "minloglevel": 2,
}


def train_llama_like(path: Path, sentences: Iterable[str], *, vocab_size: int, **changes: object) -> Path:
    """Train a model on `sentences` and write it to `path`. changes: other settings of sentencepiece."""
    model = io.BytesIO()
    settings = {**LLAMA_SETTINGS, "vocab_size": vocab_size, **changes}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path

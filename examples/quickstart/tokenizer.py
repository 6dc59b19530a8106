"""Tokenizer of the quickstart: a small sentencepiece model with LLaMA's special ids, trained on the data set's text."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece


def train_tokenizer(texts: Iterable[str], path: Path, *, vocab_size: int) -> None:
    """Train a BPE model with byte fallback, dummy prefix, unk 0, bos 1 and eos 2 like LLaMA's, and write it to `path`.

    `texts` are lines.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,  # the same model on every machine
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())

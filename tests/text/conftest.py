"""Session fixtures: small sentencepiece models like that of LLaMA."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece

from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.tokenizer import Tokenizer

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What animal is this? ASSISTANT: A cat. It is sleeping on the sofa.",
    "### Human: What is it doing? ### Assistant: ## It is looking at a bird, I think.",
    "[INST] <<SYS>> You are a helpful language and vision assistant. <</SYS>> Describe it. [/INST] Two dogs run.",
    # As in LLaMA's vocabulary, the words that start a turn also have pieces without a leading space.
    '"USER": (USER) "user" (user) "assistant" (assistant) "system" (system) ' * 3,
    "## What is it? ## Short questions have  short answers.   Long ones    do not.",
]


def _train(path: Path, *, control_symbols: Iterable[str] = ()) -> Path:
    """Train a BPE model with byte fallback, dummy prefix, no normalisation, and the special ids of LLaMA."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        control_symbols=list(control_symbols), hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("text") / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return SentencePieceTokenizer(model_path)


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Model with the tokens <|im_start|> and <|im_end|>, as used for chatml."""
    return SentencePieceTokenizer(
        _train(tmp_path_factory.mktemp("text") / "chatml.model", control_symbols=("<|im_start|>", "<|im_end|>"))
    )

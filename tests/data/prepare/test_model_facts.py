"""Facts of a run's model that the doctor prints, and what does not fit between model, tokenizer and template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_hf_tokenizer import write_qwen_like
from tiny_tokenizer import WORDS, train_llama_like

from megatron_share4v.config.load import load
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.data.prepare.model_facts import format_model_facts
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    return load_tokenizer(train_llama_like(path, [" ".join(WORDS)] * 20, vocab_size=300))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_qwen_like(tmp_path_factory.mktemp("qwen")))


def facts(model: ModelConfig, tokenizer: Tokenizer, template: str) -> dict[str, str]:
    return {line[:12].rstrip(): line[12:] for line in format_model_facts(model, tokenizer, template).splitlines()}


def test_full_vocabulary(llama: Tokenizer) -> None:
    tokens = llama.vocab_size
    found = facts(ModelConfig(language=LanguageConfig(vocab_size=tokens)), llama, "vicuna_v1")
    assert found["tower"] == ("clip_vision_model at 336 px, 23 of 24 blocks; 24 x 24 patches, 576 positions per image")
    assert found["language"] == "llama, 32 layers, 32 query heads"
    assert found["vocabulary"] == (
        f"{tokens} rows, {tokens} tokens, 0 spare rows; <image> in exports: {tokens}, a new row"
    )
    start = "vicuna_v1, answers end with </s>; templates with special tokens of this tokenizer: vicuna_v1, share4v_v1"
    assert found["template"].startswith(start) and "qwen" not in found["template"]


def test_spare_rows_and_unseen_pixels(qwen: Tokenizer, repository: Path) -> None:
    tower = load(VisionConfig, repository / "examples/models/vision/siglip_so400m_384.yaml")
    language = load(LanguageConfig, repository / "examples/models/language/qwen2.5_1.5b.yaml")
    found = facts(ModelConfig(vision=tower, language=language), qwen, "plain")
    assert found["tower"] == (
        "siglip_vision_model at 384 px, 26 of 27 blocks; 27 x 27 patches, 729 positions per image; "
        "the last 6 pixels right and below are not seen"
    )
    assert found["language"] == "qwen2, 28 layers, 12 query heads and 2 key-value heads, head tied to the embedding"
    tokens = qwen.vocab_size
    spare = f"{151936 - tokens} spare rows; <image> in exports: {tokens}, a spare row"
    assert found["vocabulary"] == f"151936 rows, {tokens} tokens, {spare}"
    assert found["template"].startswith("plain, answers end with a newline and no token; templates with special tokens")
    assert found["template"].endswith(": qwen_2, qwen_2.5, qwen_3")


def test_what_does_not_fit(qwen: Tokenizer, llama: Tokenizer) -> None:
    model = ModelConfig(language=replace(LanguageConfig(), vocab_size=200))
    found = facts(model, qwen, "vicuna_v1")
    assert found["vocabulary"].startswith(f"! the tokenizer has {qwen.vocab_size} tokens, more than the 200 rows")
    found = facts(model, llama, "llama_3")
    assert found["template"].startswith("! llama_3 writes <|start_header_id|>")
    assert "no special token of this tokenizer; templates with special tokens of" in found["template"]

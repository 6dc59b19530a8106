"""Models with a tokenizer.json: their tokenizer and template survive import and export, and transformers reads them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import hf_pairs
import pytest
import torch
from hf_fixtures import read_safetensors
from tiny_hf_tokenizer import write_llama_3_like, write_phi_3_like, write_qwen_like
from transformers import AutoTokenizer

from megatron_share4v.checkpoint.hf.chat_template import to_jinja
from megatron_share4v.checkpoint.hf.exporter import export_model, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.source.template import family_template, find_template
from megatron_share4v.checkpoint.hf.tokenizer import export_tokenizer
from megatron_share4v.errors import ConversionError, DataError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.mask import IMAGE_TOKEN_INDEX, encode_chat_prompt
from megatron_share4v.text.template import get_template
from megatron_share4v.text.template_format import Message
from megatron_share4v.text.tokenizer import Tokenizer

WRITERS = {"qwen_2.5": write_qwen_like, "llama_3": write_llama_3_like, "phi_3": write_phi_3_like}
TEXTS = [
    "A cat",
    " the  image\n\n 日本語 😀",
    "<|im_end|> <|eot_id|> <|end|>\n x",
    "e\u0301 it's 123456",
    "<image>\nWhat?",
    "",
]
PUBLISHED = {  # what the chat templates of the models' own files contain, shortened
    "llama_3": "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + content + '<|eot_id|>' }}",
    "qwen_2": "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}",
    "qwen_2.5": "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}",
    "qwen_3": "{{- '<|im_start|>' + message.role + '\n<think>\n\n</think>\n\n' + content + '<|im_end|>\n' }}",
    "phi_3": "{{ '<|' + message['role'] + '|>' + '\n' + content + '<|end|>\n' }}{{ '<|assistant|>\n' }}",
    "mistral": "{{ '[INST] ' + message['content'] + ' [/INST]' }}",
    "llama_2": "{{ '<<SYS>>\n' + system }}{{ '[INST] ' + content + ' [/INST]' }}",
}


def write_files(directory: Path, own: Tokenizer, name: str, *, vocab_size: int) -> Any:
    exported = export_tokenizer(own, get_template(name), vocab_size=vocab_size)
    directory.mkdir()
    for file, content in exported.files(max_length=64).items():
        (directory / file).write_text(json.dumps(content), encoding="utf-8")
    template = to_jinja(get_template(name), bos=own.bos_id is not None)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return exported


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_transformers_reads_the_exported_tokenizer(tmp_path: Path, name: str) -> None:
    own = load_tokenizer(WRITERS[name](tmp_path / "own"))
    exported = write_files(tmp_path / "hf", own, name, vocab_size=own.vocab_size)
    reference = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert reference.convert_tokens_to_ids("<image>") == exported.image_id == own.vocab_size
    assert reference.pad_token_id == exported.pad_id
    assert (exported.pad_id == own.vocab_size + 1) == (name == "llama_3") and exported.eos_ids == sorted(
        exported.eos_ids
    )
    assert reference.eos_token_id == own.eos_id and reference.padding_side == "left"
    for text in TEXTS:
        ids = [exported.image_id if i == IMAGE_TOKEN_INDEX else i for i in encode_parts(own, text)]
        assert reference.encode(text, add_special_tokens=False) == ids, text
        assert reference.encode(text) == [*own.bos_ids, *ids]
    turns = [Message("human", "What is it?"), Message("gpt", "A cat."), Message("human", "Where?")]
    prompt = encode_chat_prompt(own, get_template(name), turns, images=[True, False, False])
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Where?"}]  # fmt: skip
    found = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert found == [exported.image_id if i == IMAGE_TOKEN_INDEX else i for i in prompt]
    again = load_tokenizer(tmp_path / "hf" / "tokenizer.json")
    assert (again.fingerprint, again.vocab_size) == (own.fingerprint, own.vocab_size)
    assert find_template([tmp_path / "hf"]).name == name


def encode_parts(own: Tokenizer, text: str) -> list[int]:
    first, *others = text.split("<image>")
    ids = own.encode(first)
    for part in others:
        ids += [IMAGE_TOKEN_INDEX, *own.encode(part)]
    return ids


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    own = load_tokenizer(write_qwen_like(tmp_path / "own"))
    with pytest.raises(ConversionError, match="model.language.vocab_size is 100"):
        export_tokenizer(own, get_template("qwen_2"), vocab_size=100)
    with pytest.raises(DataError, match="no special token of the tokenizer"):
        export_tokenizer(own, get_template("llama_3"), vocab_size=1000)


@pytest.mark.parametrize("rows", [320, 448])
def test_a_model_survives_import_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """320: rows for <image> and <pad> only, which the model here does without; 448: spare rows as Qwen's, kept."""
    monkeypatch.setitem(hf_pairs._LANGUAGE, "vocab_size", rows)
    hf_pairs.write_pair(tmp_path / "hf", "clip x qwen2 untied")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    own = load_tokenizer(write_qwen_like(tmp_path / "hf", pieces=283, chat_template=PUBLISHED["qwen_2.5"]))
    assert own.vocab_size == hf_pairs.IMAGE_TOKEN
    import_model(HfSource(directory=tmp_path / "hf"), tmp_path / "checkpoint", options=ImportOptions())
    opened = open_checkpoint(tmp_path / "checkpoint")
    assert opened.config.data.template == "qwen_2.5" and opened.config.data.tokenizer == "tokenizer.json"
    assert opened.config.model.language.vocab_size == (300 if rows == 320 else 448)
    assert opened.tokenizer.fingerprint == own.fingerprint and opened.tokenizer.path.parent == tmp_path / "checkpoint"
    export_model(tmp_path / "checkpoint", tmp_path / "back", layout="llava-hf")
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert (config["image_token_id"], config["text_config"]["vocab_size"]) == (300, rows)
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text(encoding="utf-8"))
    ends = sorted(own.token_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
    assert generation == {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": own.pad_id}
    written, read = read_safetensors(tmp_path / "hf"), read_safetensors(tmp_path / "back")
    names = [name for name in written if "embed_tokens" in name or "lm_head" in name]
    assert names and all(torch.equal(written[name], read[name]) for name in names)
    assert not (tmp_path / "back" / "tokenizer.model").exists()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_chat_templates_are_recognised(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": PUBLISHED[name]}), encoding="utf-8")
    found = find_template([tmp_path])
    assert (found.name, found.assumed) == (name, False) and "the markers that the chat template in" in found.reason


def test_without_a_chat_template_the_family_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizers = {name: load_tokenizer(write(tmp_path / name)) for name, write in WRITERS.items()}
    assert family_template(tokenizers["llama_3"], "llama") == "llama_3"
    assert family_template(tokenizers["qwen_2.5"], "qwen2") == "qwen_2.5"
    assert family_template(tokenizers["qwen_2.5"], "qwen3") == "qwen_3"
    assert family_template(tokenizers["phi_3"], "mistral") == "mistral"
    hf_pairs.write_pair(tmp_path / "hf", "clip x qwen3")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    write_qwen_like(tmp_path / "hf", pieces=283)
    get_logger().propagate, before = True, get_logger().propagate
    with caplog.at_level(logging.WARNING, logger=get_logger().name):
        import_model(HfSource(directory=tmp_path / "hf"), tmp_path / "checkpoint", options=ImportOptions())
    get_logger().propagate = before
    assert open_checkpoint(tmp_path / "checkpoint").config.data.template == "qwen_3"
    assert "qwen_3 is assumed, because no file in" in caplog.text and "family of language models" in caplog.text

"""Template, tokenizer rule and added tokens of a Hugging Face model survive import, export and the next import."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_fixtures import MODEL, PIECES, write_json, write_llava_hf, write_share4v
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_share4v.checkpoint.assets import open_tokenizer
from megatron_share4v.checkpoint.hf.chat_template import to_jinja
from megatron_share4v.checkpoint.hf.exporter import export_model, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.source.template import find_template
from megatron_share4v.checkpoint.hf.source.tokenizer_rule import open_source_tokenizer
from megatron_share4v.checkpoint.hf.verify import verify_conversion
from megatron_share4v.checkpoint.inspect import describe_checkpoint
from megatron_share4v.config.data import DataConfig
from megatron_share4v.errors import ConfigError, ConversionError, DataError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import get_template

SEG = {"content": "[SEG]", "lstrip": False, "rstrip": False, "normalized": False, "special": False}
LAYOUTS = ("llava-hf", "share4v")


def import_checkpoint(source: Path, target: Path, *, template: str | None = None, **options: Any) -> Path:
    import_model(HfSource(directory=source, **options), target, options=ImportOptions(template=template))
    return target


def template_of(checkpoint: Path) -> str:
    return open_checkpoint(checkpoint).config.data.template


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return write_llava_hf(tmp_path / "llava")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_template_of_an_export_is_recognised(llava: Path, tmp_path: Path, layout: str) -> None:
    first = import_checkpoint(llava, tmp_path / "first", template="llava_v1")
    export_model(first, tmp_path / "export", layout=layout)
    assert template_of(import_checkpoint(tmp_path / "export", tmp_path / "second")) == "share4v_v1"
    assert template_of(import_checkpoint(tmp_path / "export", tmp_path / "third", template="v0")) == "vicuna_v0"


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "named"])
def test_the_template_is_read_where_transformers_reads_it(tmp_path: Path, file: str) -> None:
    """Exports of older versions, whose provenance.json does not name it."""
    source = to_jinja(get_template("share4v_v1"))
    write_json(tmp_path / "provenance.json", {"step": 0, "weights": {}})
    if file.endswith(".jinja"):
        (tmp_path / file).write_text(source, encoding="utf-8")
    elif file == "named":
        templates = [{"name": "rag", "template": "{{ x }}"}, {"name": "default", "template": source}]
        write_json(tmp_path / "tokenizer_config.json", {"chat_template": templates})
    else:
        write_json(tmp_path / file, {"chat_template": source})
    found = find_template([tmp_path])
    assert (found.name, found.assumed) == ("share4v_v1", False) and str(tmp_path) in found.reason


def test_an_unknown_template_is_assumed_by_name_and_reason(
    llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    with caplog.at_level(logging.WARNING, logger=get_logger().name):
        import_checkpoint(llava, tmp_path / "unstated")
        write_json(llava / "chat_template.json", {"chat_template": "{{ messages }}"})
        import_checkpoint(llava, tmp_path / "foreign")
    unstated, foreign = [line for line in caplog.messages if line.startswith("template:")]
    assert "vicuna_v1 is assumed, because no file in" in unstated and "--template NAME" in unstated
    assert f"the chat template in {llava / 'chat_template.json'} is none of this project's" in foreign
    with pytest.raises(ConfigError, match="nearest is"):
        import_checkpoint(llava, tmp_path / "typed", template="vicuna_v2")
    write_json(llava / "provenance.json", {"template": "later_v3"})
    with pytest.raises(ConversionError, match="provenance.json: template 'later_v3' is not known"):
        import_checkpoint(llava, tmp_path / "later")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (None, "transformers-4.31"),
        ({"legacy": False}, "transformers-4.31"),
        ({"legacy": True}, "legacy"),
        ({"pad_token": "<unk>"}, "legacy"),
        ({"legacy": False, "tokenizer_rule": "transformers-4.34"}, "transformers-4.34"),
    ],
)
def test_the_tokenizer_rule_is_carried(llava: Path, tmp_path: Path, layout: str, config: dict, rule: str) -> None:
    (llava / "tokenizer_config.json").unlink(missing_ok=True)
    if config is not None:
        write_json(llava / "tokenizer_config.json", config)
    checkpoint = import_checkpoint(llava, tmp_path / "checkpoint")
    assert open_tokenizer(checkpoint, open_checkpoint(checkpoint).config.data).rule == rule
    assert any(
        line.endswith(f"rule {rule}") for line in describe_checkpoint(checkpoint, hashes=False, every_layer=False)
    )
    export_model(checkpoint, tmp_path / "export", layout=layout)
    exported = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert (exported["legacy"], exported["tokenizer_rule"]) == (rule == "legacy", rule)
    assert json.loads((tmp_path / "export" / "provenance.json").read_text())["tokenizer_rule"] == rule
    again = import_checkpoint(tmp_path / "export", tmp_path / "again")
    assert open_checkpoint(again).tokenizer.rule == rule


def test_an_option_chooses_the_rule_and_an_old_checkpoint_is_legacy(llava: Path, tmp_path: Path) -> None:
    checkpoint = import_checkpoint(llava, tmp_path / "checkpoint", tokenizer_rule="transformers-4.34")
    assert open_checkpoint(checkpoint).tokenizer.rule == "transformers-4.34"
    (checkpoint / "tokenizer_config.json").unlink()
    assert open_tokenizer(checkpoint, DataConfig(train="", tokenizer="")).rule == "legacy"


def share4v_with_row(directory: Path) -> Path:
    """Write a ShareGPT4V model with one vocabulary row more than its tokenizer has pieces."""
    language = replace(MODEL.language, vocab_size=PIECES + 1)
    return write_share4v(directory, replace(MODEL, language=language), inside=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_added_after_training_is_carried_from_share4v(tmp_path: Path, layout: str) -> None:
    source = share4v_with_row(tmp_path / "share4v")
    write_json(source / "added_tokens.json", {"[SEG]": PIECES})
    checkpoint = import_checkpoint(source, tmp_path / "checkpoint")
    assert open_checkpoint(checkpoint).config.model.language.vocab_size == PIECES + 1
    assert open_checkpoint(checkpoint).tokenizer.encode("[SEG]") == [PIECES]
    export_model(checkpoint, tmp_path / "export", layout=layout)
    exported = SentencePieceTokenizer(tmp_path / "export" / "tokenizer.model")
    assert exported.encode("[SEG]") == [PIECES] and exported.added[0].lstrip
    assert open_checkpoint(import_checkpoint(tmp_path / "export", tmp_path / "again")).tokenizer.added == exported.added
    if layout == "llava-hf":
        config = json.loads((tmp_path / "export" / "config.json").read_text())
        assert config["image_token_index"] == PIECES + 1


def test_a_token_after_image_and_pad_keeps_its_id(llava: Path, tmp_path: Path) -> None:
    """transformers' add_tokens on a llava-hf model: [SEG] comes after <image> and <pad>."""
    tokens = {PIECES: "<image>", PIECES + 1: "<pad>", PIECES + 2: "[SEG]"}
    decoder = {str(i): SEG | {"content": text, "special": text != "[SEG]"} for i, text in tokens.items()}
    write_json(llava / "tokenizer_config.json", {"legacy": False, "added_tokens_decoder": decoder})
    checkpoint = import_checkpoint(llava, tmp_path / "checkpoint")
    opened = open_checkpoint(checkpoint)
    assert opened.config.model.language.vocab_size == PIECES + 3
    assert opened.tokenizer.encode("A [SEG]")[-1] == PIECES + 2
    assert PIECES not in opened.tokenizer.encode("<image>")  # typed, it is text
    assert opened.tokenizer.decode([PIECES, PIECES + 2]) == "[SEG]"
    assert verify_conversion(HfSource(directory=llava), checkpoint)
    export_model(checkpoint, tmp_path / "export", layout="llava-hf")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (PIECES, PIECES + 1)
    assert config["text_config"]["vocab_size"] == 320
    before, after = load_file(llava / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    reference = AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    for text in ("A cat [SEG] is", "[SEG][SEG]</s>USER: is [SEG]"):
        assert reference(text, add_special_tokens=False)["input_ids"] == opened.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            {"[SEG]": PIECES, "[BOX]": PIECES + 1},
            ConversionError,
            r"300 pieces and the added token '\[BOX\]' with id 301",
        ),
        ({"[SEG]": PIECES + 5}, DataError, "next free one is 300"),
    ],
)
def test_added_tokens_without_a_row_are_refused_by_name(
    tmp_path: Path, tokens: dict, error: type, message: str
) -> None:
    source = share4v_with_row(tmp_path / "share4v")
    write_json(source / "added_tokens.json", tokens)
    with pytest.raises(error, match=message):
        import_checkpoint(source, tmp_path / "checkpoint")


def test_an_adapters_directory_adds_tokens_to_those_of_its_base(tmp_path: Path, llava: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert open_source_tokenizer([adapter, llava], given=None, rule=None).added == ()
    write_json(adapter / "added_tokens.json", {"[SEG]": PIECES})
    assert [token.text for token in open_source_tokenizer([adapter, llava], given=None, rule=None).added] == ["[SEG]"]

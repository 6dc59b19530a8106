"""A run on data prepared with a tokenizer.json: what it opens, what its checkpoints carry, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_hf_tokenizer import write_llama_3_like, write_qwen_like

from megatron_share4v.checkpoint.assets import asset_files, copy_assets_to_run, open_stored_tokenizer, write_tokenizer
from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.prepare.options import PrepareOptions
from megatron_share4v.data.prepare.writer import prepare
from megatron_share4v.data.sampling.fingerprint import describe_data, fingerprint_differences
from megatron_share4v.errors import DataError
from megatron_share4v.parallel.device import Device
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.train.build import check_start_tokenizer, open_source, read_options
from megatron_share4v.train.data_feed import Source


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_qwen_like(root / "qwen")
    (root / "images").mkdir()
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat on a sofa."}]
    (root / "a.json").write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(8)]))
    for name in ("answer_only", "official"):
        prepare(
            PrepareOptions(
                annotations=root / "a.json",
                images=root / "images",
                output=root / name,
                tokenizer=root / "qwen" / "tokenizer.json",
                template="qwen_2",
                trained_markers=name,
                max_text_length=128,
            )
        )
    golden = repository / "tests" / "golden" / "before_renames"
    for name in ("tokenizer.model", "run.yaml"):
        shutil.copyfile(golden / name, root / name)
    return root


def config_of(root: Path, markers: str = "answer_only", **changes: object) -> RunConfig:
    values = {
        "data.train": root / markers,
        "data.validation": root / markers,
        "data.tokenizer": root / "qwen" / "tokenizer.json",
        "data.template": "qwen_1_5",
        "data.trained_markers": markers,
        "data.max_text_length": 128,
        "model.language.vocab_size": 640,
        **changes,
    }
    return load_run(root / "run.yaml", [f"{name}={value}" for name, value in values.items()])


def opened(config: RunConfig) -> Source:
    options = read_options(config.data, device=Device("cpu"))
    return open_source(config, config.data.train, order=config.data.order, options=options)


def test_a_resumed_run_notices_other_markers(root: Path) -> None:
    answers, official = opened(config_of(root)), opened(config_of(root, "official"))
    assert official.encoder.template.trained_markers == "official"
    saved, now = (describe_data(one.sampler, one.encoder) for one in (answers, official))
    differences = "; ".join(fingerprint_differences(saved, now))
    assert "trained_markers: was not set, is official" in differences and "tokenizer_rule" not in now


def test_a_run_with_other_settings_than_its_data_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trained_markers is official, prepared with answer_only"):
        opened(replace(config_of(root), data=replace(config_of(root).data, trained_markers="official")))
    with pytest.raises(DataError, match="tokenizer is .*, prepared with .*; tokenizer_rule is .*, prepared with None"):
        opened(config_of(root, **{"data.tokenizer": root / "tokenizer.model"}))
    write_llama_3_like(tmp_path)
    with pytest.raises(DataError, match=r"writes <\|im_start\|> and <\|im_end\|>|tokenizer is .*, prepared with"):
        opened(config_of(root, **{"data.tokenizer": tmp_path / "tokenizer.json"}))
    with pytest.raises(DataError, match="tokens .*more than model.language.vocab_size 64"):
        opened(config_of(root, **{"model.language.vocab_size": 64}))


def test_checkpoints_carry_the_files_of_one_tokenizer(root: Path, tmp_path: Path) -> None:
    own = load_tokenizer(root / "qwen" / "tokenizer.json")
    folder = copy_assets_to_run(tmp_path, tokenizer=own, start=None, resumes=False)
    assert [path.name for path in asset_files(folder)] == ["tokenizer.json", "tokenizer_config.json"]
    stored = open_stored_tokenizer(folder / "tokenizer.json")
    assert (stored.fingerprint, stored.eos_id) == (own.fingerprint, own.eos_id)
    copy_assets_to_run(tmp_path, tokenizer=SentencePieceTokenizer(root / "tokenizer.model"), start=None, resumes=False)
    assert [path.name for path in asset_files(folder)] == ["tokenizer.model", "tokenizer_config.json"]


def test_a_start_with_another_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    own = load_tokenizer(root / "qwen" / "tokenizer.json")
    write_tokenizer(tmp_path, own)
    check_start_tokenizer(tmp_path, own)
    content = json.loads((root / "qwen" / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][-1], "content": "[SEG]", "id": own.vocab_size})
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copyfile(root / "qwen" / "tokenizer_config.json", tmp_path / "more" / "tokenizer_config.json")
    check_start_tokenizer(tmp_path, load_tokenizer(tmp_path / "more" / "tokenizer.json"))
    others = (
        load_tokenizer(write_llama_3_like(tmp_path / "llama", pieces=300)),
        SentencePieceTokenizer(root / "tokenizer.model"),
    )
    for other in others:
        with pytest.raises(DataError, match="was trained with another tokenizer .* than this run's data.tokenizer"):
            check_start_tokenizer(tmp_path, other)

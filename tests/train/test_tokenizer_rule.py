"""A run follows the tokenizer rule that its data sets were prepared with, and names every difference from it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_share4v.checkpoint.assets import write_tokenizer
from megatron_share4v.config.data import BlendSource
from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.sampling.fingerprint import describe_data, fingerprint_differences
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.device import Device
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import TokenizerRule, TokenizerSettings
from megatron_share4v.train.build import check_start_tokenizer, open_source, read_options
from megatron_share4v.train.data_feed import Source


@pytest.fixture
def old(tmp_path: Path, repository: Path) -> Path:
    """A data set that does not state its rule, as written before there were rules, with its tokenizer."""
    golden = repository / "tests" / "golden" / "before_renames"
    shutil.copytree(golden / "data", tmp_path / "data")
    for name in ("tokenizer.model", "run.yaml"):
        shutil.copyfile(golden / name, tmp_path / name)
    assert "tokenizer_rule" not in json.loads((tmp_path / "data" / "dataset.json").read_text())
    return tmp_path


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.WARNING, logger=get_logger().name)
    return caplog


def data_with_rule(old: Path, name: str, rule: TokenizerRule) -> str:
    directory = shutil.copytree(old / "data", old / name)
    content = json.loads((directory / "dataset.json").read_text())
    (directory / "dataset.json").write_text(json.dumps(content | {"tokenizer_rule": rule}))
    return str(directory)


def config_of(old: Path) -> RunConfig:
    paths = [
        f"data.train={old / 'data'}",
        f"data.validation={old / 'data'}",
        f"data.tokenizer={old / 'tokenizer.model'}",
    ]
    return load_run(old / "run.yaml", paths)


def opened(config: RunConfig, data: str | tuple[BlendSource, ...], rule: TokenizerRule | None = None) -> Source:
    options = read_options(config.data, device=Device("cpu"))
    return open_source(config, data, order="sequential", options=options, rule=rule)


def test_an_old_data_set_is_trained_with_the_old_rule(old: Path, warnings: pytest.LogCaptureFixture) -> None:
    config = config_of(old)
    source = opened(config, config.data.train)
    assert source.encoder.tokenizer.rule == "legacy" and not warnings.messages
    assert "tokenizer_rule" not in describe_data(source.sampler, source.encoder)  # as in older checkpoints
    (old / "tokenizer_config.json").write_text('{"legacy": false}')
    assert opened(config, config.data.train).encoder.tokenizer.rule == "legacy"
    [message] = warnings.messages
    assert (
        "prepared with tokenizer rule legacy, which this run uses; the tokenizer's is rule transformers-4.31" in message
    )
    assert f"{old / 'tokenizer_config.json'} says legacy: false" in message


def test_a_resumed_run_notices_another_rule(old: Path) -> None:
    config = config_of(old)
    source, other = (opened(config, data_with_rule(old, rule, rule)) for rule in ("legacy", "transformers-4.31"))
    before, now = (describe_data(one.sampler, one.encoder) for one in (source, other))
    assert fingerprint_differences(before, now) == ["tokenizer_rule: was not set, is transformers-4.31"]


def test_data_sets_of_different_rules_are_refused(old: Path) -> None:
    config, newer = config_of(old), data_with_rule(old, "newer", "transformers-4.31")
    differs = "tokenizer_rule is transformers-4.31, prepared with legacy"
    with pytest.raises(DataError, match=f"data set {old / 'data'} .*{differs}"):
        opened(config, (BlendSource(path=newer), BlendSource(path=str(old / "data"))))
    with pytest.raises(DataError, match=differs):  # the validation set of a run on the newer one
        opened(config, str(old / "data"), opened(config, newer).encoder.tokenizer.rule)


def test_a_checkpoint_of_another_rule_is_named(old: Path, warnings: pytest.LogCaptureFixture) -> None:
    tokenizer = SentencePieceTokenizer(old / "tokenizer.model")
    start = old / "start"
    start.mkdir()
    write_tokenizer(start, replace_rule(tokenizer, "legacy"))
    check_start_tokenizer(start, replace_rule(tokenizer, "legacy"))
    assert not warnings.messages
    check_start_tokenizer(start, tokenizer)
    [message] = warnings.messages
    assert f"{start} has tokenizer rule legacy, the data set of this run transformers-4.31" in message
    assert "--tokenizer-rule legacy" in message


def replace_rule(tokenizer: Tokenizer, rule: TokenizerRule) -> Tokenizer:
    return SentencePieceTokenizer(tokenizer.path, settings=replace(tokenizer.settings, rule=rule))


def test_settings_survive_a_checkpoint(tmp_path: Path, old: Path) -> None:
    for rule in ("legacy", "transformers-4.31", "transformers-4.34"):
        write_tokenizer(
            tmp_path, SentencePieceTokenizer(old / "tokenizer.model", settings=TokenizerSettings(rule=rule))
        )
        assert SentencePieceTokenizer(tmp_path / "tokenizer.model").rule == rule

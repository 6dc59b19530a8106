"""Blends and packing in the configuration: accepted values and conflicting ones."""

from pathlib import Path

import pytest

from megatron_share4v.config.data import BlendSource
from megatron_share4v.config.load import dump, load, load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError


def _write(tmp_path: Path, train: str, more: str = "") -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {directory: runs/x}\ndata:\n  tokenizer: t.model\n"
        f"  train: {train}\n{more}train: {{global_batch_size: 8}}\n"
    )
    return path


def test_blend_round_trips(tmp_path: Path):
    config = load_run(_write(tmp_path, "[{path: a, weight: 2.0}, {path: b, weight: 1}]"))
    assert config.data.train == (BlendSource(path="a", weight=2.0), BlendSource(path="b", weight=1.0))
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "resolved.yaml") == config
    assert load_run(_write(tmp_path, "only")).data.train == "only"


@pytest.mark.parametrize(
    ("train", "more", "message"),
    [
        ("[]", "", "train is an empty list"),
        ("[{path: a, weight: 2}, {path: b}]", "", "train mixes weights and epochs"),
        ("[{path: a, weight: 2}, {path: b, weight: 1, epochs: 2}]", "", "train mixes weights and epochs"),
        ("a", "  pack_length: 512\n  order: group_by_modality_length\n", "pack_length 512 needs another order"),
        ("a", "  worker_timeout_s: 300\n", "timeout_s 600 ends the job before a loader process that hangs twice"),
        (
            "a",
            "  pack_length: 511\nparallel: {tensor: 2, sequence: true}\n",
            "data.pack_length 511 is not divisible by 2, "
            "as .* parallel.tensor 2 and parallel.sequence true needs; use 512",
        ),
    ],
)
def test_conflicting_options_are_refused(tmp_path: Path, train: str, more: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_run(_write(tmp_path, train, more))

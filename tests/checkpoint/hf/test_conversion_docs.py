"""The commands of docs/conversion.md, run on small models as they are written there."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hf_fixtures import MODEL, SHARE4V, random_hf_weights, write_clip, write_llama, write_llava_hf, write_share4v

from megatron_share4v.checkpoint.manifest import read_manifest, write_manifest
from megatron_share4v.config.run import CheckpointConfig
from megatron_share4v.logging import get_logger

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "conversion.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create weights/ as the document describes."""
    root = tmp_path_factory.mktemp("document")
    tower = "ShareGPT4V-7B_Pretrained_vit-large336-l12"
    write_share4v(root / "weights" / "ShareGPT4V-7B", tower=f"Lin-Chen/{tower}")
    write_clip(root / "weights" / tower, seed=4)
    write_llama(root / "weights" / "vicuna-7b-v1.5")
    write_clip(root / "weights" / "clip-vit-large-patch14-336")
    torch.save(random_hf_weights(MODEL, SHARE4V, "projector"), root / "weights" / "mm_projector.bin")
    write_llava_hf(root / "weights" / "llava-1.5-7b-hf")
    return root


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Run a documented command in `place`; restore the logging settings afterwards."""
    monkeypatch.chdir(place)
    logger = get_logger()
    before = logger.level, logger.propagate

    def failed(code: int) -> None:
        raise AssertionError(f"ended with exit code {code}")

    monkeypatch.setattr(os, "_exit", failed)

    def run_command(line: str) -> None:
        python, tool, *arguments = shlex.split(line)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        runpy.run_path(str(ROOT / tool))["main"]()

    yield run_command
    logger.level, logger.propagate = before
    logger.handlers.clear()


def of(*words: str) -> list[str]:
    return [line for line in COMMANDS if all(word in line for word in words)]


def test_every_command_in_its_order(
    place: Path, run: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [shlex.split(line)[2] for line in COMMANDS] == [
        *["import"] * 3,
        "inspect",
        "average",
        "prune",
        *["export"] * 2,
        "verify",
    ]
    for line in of(" import "):
        run(line)
    assert {path.name for path in (place / "checkpoints").iterdir()} == {"share4v_7b", "share4v_7b_start", "llava15_7b"}
    for step in (1, 2, 3):  # in place of a trained run's
        checkpoint = place / "runs" / "share4v_7b" / "finetune" / "checkpoints" / f"step_{step:08d}"
        shutil.copytree(place / "checkpoints" / "share4v_7b", checkpoint)
        manifest = read_manifest(checkpoint)
        write_manifest(checkpoint, replace(manifest, state=replace(manifest.state, step=step)))
    for line in of("inspect") + of("average") + of("prune"):
        run(line)
    printed = capsys.readouterr().out
    assert "vision: sha256" in printed and printed.count("removed ") == 2
    assert read_manifest(place / "checkpoints" / "mean").source == "mean of step_00000002, step_00000003"
    for line in of("export") + of("verify"):
        if " export " in line or " verify " in line:
            run(line)
    printed = capsys.readouterr().out
    assert "72 tensors equal" in printed and "ids equal, pixels equal, greedy answers equal" in printed
    assert (place / "exports" / "llava-sharegpt4v-7b" / "clip" / "model.safetensors").is_file()


def test_the_configuration_that_is_shown() -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    section = yaml.safe_load(block.replace("0" * 64, "'" + "0" * 64 + "'"))["checkpoint"]
    assert len(CheckpointConfig(**section).expect_tower or "") == 64

"""Data sets, runs and checkpoints written before the modules were renamed still load (tests/golden/before_renames).

Pickled class paths, module names in fingerprints, manifest keys and configuration keys could break them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from forked_tools import Tool
from launching import finish, lines
from tolerances import GOLDEN_LOSS

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.manifest import verify_files

EXPECTED = json.loads((Path(__file__).parents[1] / "golden" / "before_renames" / "expected.json").read_text())


@pytest.fixture
def old(tmp_path: Path, repository: Path) -> Path:
    """A writable copy of the old files."""
    return shutil.copytree(repository / "tests" / "golden" / "before_renames", tmp_path / "old")


def train(old: Path, directory: str, *overrides: str) -> str:
    """Run tools/train.py on one process in `old/directory`; return its output."""
    paths = (
        f"data.train={old / 'data'}",
        f"data.validation={old / 'data'}",
        f"data.tokenizer={old / 'tokenizer.model'}",
    )
    overrides = (f"run.directory={old / directory}", *paths, *overrides)
    return finish(Tool("tools/train.py", old / "run.yaml", *overrides, merged=True))


def check_steps(directory: Path, losses: dict[str, float], keys: dict[str, list[str]]) -> None:
    """Each step appears once in both files, with the losses and sample keys that the old code recorded."""
    metrics, samples = lines(directory / "metrics.jsonl"), lines(directory / "samples.jsonl")
    assert [line["step"] for line in metrics] == [line["step"] for line in samples] == [int(step) for step in losses]
    assert {str(line["step"]): line["keys"] for line in samples} == keys
    assert {str(line["step"]): line["loss"] for line in metrics} == pytest.approx(losses, rel=GOLDEN_LOSS)


def test_train_on_old_data(old: Path) -> None:
    train(old, "fresh", "train.steps=6")
    check_steps(old / "fresh", EXPECTED["losses"], EXPECTED["keys"])


def test_resume_old_run(old: Path) -> None:
    """Steps 4 to 6 continue a run of 3 steps: losses and samples equal the undisturbed run of the old code."""
    output = train(old, "run", "train.steps=6")
    assert "loaded" in output and "step_00000003" in output
    check_steps(old / "run", EXPECTED["losses"], EXPECTED["keys"])
    verify_files(old / "run" / "checkpoints" / "step_00000006", contents=True)


def test_resume_old_run_at_other_layout(old: Path) -> None:
    """A checkpoint written at tensor parallel size 2 is resumed on one process."""
    train(old, "tensor2", "train.steps=4", "train.validate_every_steps=0")
    check_steps(old / "tensor2", EXPECTED["tensor2_losses"], EXPECTED["tensor2_keys"])


@pytest.mark.parametrize("export", EXPECTED["exports"])
def test_export_old_checkpoint(old: Path, export: str) -> None:
    """Exports are the bytes that the old code wrote."""
    directory, layout, file = export.split()
    export_model(old / directory, old / "exported", layout=layout)
    assert hashlib.sha256((old / "exported" / file).read_bytes()).hexdigest() == EXPECTED["exports"][export]

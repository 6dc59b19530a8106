"""Facts of a run card that can be checked without a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_share4v.train import run_facts


def test_changed_files_have_their_whole_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "megatron_share4v"
    package.mkdir()
    for file in (package / "__init__.py", tmp_path / "examples.py"):
        file.write_text("x = 1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(run_facts.megatron_share4v, "__file__", str(package / "__init__.py"))
    assert run_facts.describe_code()["changed"] == "nothing"
    for file in (package / "__init__.py", tmp_path / "examples.py"):
        file.write_text("x = 2\n")
    assert run_facts.describe_code()["changed"] == "examples.py, megatron_share4v/__init__.py"

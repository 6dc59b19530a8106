"""Fixtures shared by the conversion tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from exported_model import CORPUS, PIECES
from hf_fixtures import write_llava_hf

from examples.quickstart.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on the corpus of exported_model.py."""
    path = tmp_path_factory.mktemp("tokenizer") / "model.model"
    train_tokenizer(CORPUS * 20, path, vocab_size=PIECES)
    return path


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llava-hf model."""
    return write_llava_hf(tmp_path_factory.mktemp("llava") / "hf")


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    """A writable copy of that model."""
    return Path(shutil.copytree(llava, tmp_path / "hf"))

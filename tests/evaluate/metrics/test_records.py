"""Metric modules: frozen records, a headline for every published number, and only the standard library."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

import pytest

from megatron_share4v.evaluate import metrics

FILES = sorted(path for path in Path(metrics.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_records_are_frozen(path: Path) -> None:
    module = importlib.import_module(f"{metrics.__name__}.{path.stem}")
    records = [
        kind for _, kind in inspect.getmembers(module, dataclasses.is_dataclass) if kind.__module__ == module.__name__
    ]
    assert all(kind.__dataclass_params__.frozen for kind in records)
    assert path.stem in ("profile", "arithmetic", "vqa_answers") or any(hasattr(kind, "headline") for kind in records)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_the_standard_library(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    allowed = ("megatron_share4v.errors", metrics.__name__)
    assert not [
        name for name in imported if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith(allowed)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_package_docstring_lists_every_module(path: Path) -> None:
    assert f" {path.stem} " in metrics.__doc__.replace("\n", " \n")

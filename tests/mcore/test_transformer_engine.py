"""Transformer Engine is found where it is installed, before it or megatron-core has been imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import torch
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
from megatron_share4v.mcore import transformer_engine
print(transformer_engine.te_unavailable_reason())
"""
CORE_EXTENSION = "import types; core = types.ModuleType('te'); core.HAVE_TE = {found}; sys.modules[{name!r}] = core"


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("recognised", [True, False])
def test_found_before_it_is_imported(tmp_path: Path, installed: bool, recognised: bool) -> None:
    """The extension of a wheel lies outside the import path, so only the package itself can be looked for."""
    if installed:
        (tmp_path / "transformer_engine").mkdir()
        (tmp_path / "transformer_engine/__init__.py").write_text("")
    extension = CORE_EXTENSION.format(found=recognised, name="megatron.core.extensions.transformer_engine")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{extension}\n{CHECK}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    if not installed:
        assert result.stdout.strip() == "Transformer Engine is not installed"
    elif recognised:
        assert result.stdout.strip() == "None"
    else:
        assert "cannot use the installed Transformer Engine" in result.stdout

"""What every test may use. Worlds of processes live in harness.py, which also says which ops they run with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from signal_guard import pytest_configure  # noqa: F401 (a hook of pytest's)

from megatron_share4v import mcore  # noqa: F401  (opens the CPU door before any test file imports megatron.core, in whatever order they are collected)
from megatron_share4v.ops.backend import choose_ops
from megatron_share4v.ops.build import find_toolchain


def pytest_collection_finish() -> None:
    """The fork server of harness.py imports while the first tests run, if any file that was collected uses it."""
    if "harness" in sys.modules:
        sys.modules["harness"].start_forkserver()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def native_ops() -> None:
    """The native ops are loaded into this process."""
    if find_toolchain() is None:
        pytest.skip("no C++ compiler on PATH")
    choose_ops("native", device="cpu")

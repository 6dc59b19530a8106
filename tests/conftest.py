"""Markers and fixtures of all tests. Process worlds are in harness.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from signal_guard import pytest_configure  # noqa: F401 (a hook of pytest's)

from megatron_share4v import mcore  # noqa: F401  (patches torch.cuda on a CPU before any import of megatron.core)
from megatron_share4v.ops.backend import choose_ops_backend
from megatron_share4v.ops.build import find_toolchain

MARKERS = {
    "fault": re.compile(r"^tests/resilience/"),
    "browser": re.compile(r"^tests/serve/test_page"),
    "bench": re.compile(r"/test_bench|^tests/train/test_gpu_scripts"),
}
"""Marker by path, relative to the root of the checkout."""
PROCESSES = re.compile(r"\b(run_world|run_tool|Tool|torchrun|subprocess|Popen|quickstart|multiprocessing)\b")
"""A test file that mentions one of these starts processes: `world`; any other is `unit`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the markers that follow from a test's file. `matrix` alone is set by hand."""
    sources: dict[Path, str] = {}
    root = Path(__file__).resolve().parents[1]
    for item in items:
        text = sources.setdefault(item.path, item.path.read_text(encoding="utf-8"))
        item.add_marker("world" if PROCESSES.search(text) else "unit")
        for marker, pattern in MARKERS.items():
            if pattern.search(item.path.relative_to(root).as_posix()):
                item.add_marker(marker)


def pytest_collection_finish() -> None:
    """Start the fork server of harness.py, if a collected file uses it, so that it imports during the first tests."""
    if "harness" in sys.modules:
        sys.modules["harness"].start_forkserver()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def native_ops() -> None:
    """Load the native ops into this process, or skip without a C++ compiler."""
    if find_toolchain() is None:
        pytest.skip("no C++ compiler on PATH")
    choose_ops_backend("native", device="cpu")

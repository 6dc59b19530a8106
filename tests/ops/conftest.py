"""What tests of the ops share."""

from __future__ import annotations

import pytest

from megatron_share4v.ops.build import find_toolchain
from megatron_share4v.ops.choose import choose_ops


@pytest.fixture(scope="session")
def native_ops() -> None:
    """The native ops are loaded into this process."""
    if find_toolchain() is None:
        pytest.skip("no C++ compiler on PATH")
    choose_ops("native", device="cpu")

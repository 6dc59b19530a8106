"""Single-process world for the tests of models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Mesh of one rank, closed before the next module."""
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=60),
        open_mesh(Layout(), device=device) as mesh,
    ):
        yield mesh

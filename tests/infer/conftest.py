"""A mesh of one rank in this process, and the small model on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_helpers import build

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


@pytest.fixture(scope="module")
def chunks(mesh: Mesh) -> list:
    """Model chunks of engine_helpers.build."""
    return build(mesh)

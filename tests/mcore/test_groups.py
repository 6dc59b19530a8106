"""A Mesh: its groups are the layout's, its coordinates are right, and a world of another size raises an error."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_world

from megatron_share4v.errors import ConfigError
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout


def places(layouts: list[Layout]) -> list[dict]:
    """Return the mesh properties of each layout on one rank, one layout after the other in the same world."""
    found = []
    for layout in layouts:
        with open_mesh(layout, device=Device("cpu")) as mesh:
            found.append(
                {
                    "rank": mesh.rank,
                    "coordinates": mesh.coordinates,
                    "tensor": dist.get_process_group_ranks(mesh.tp_group),
                    "data": dist.get_process_group_ranks(mesh.dp_group),
                    "pipeline": dist.get_process_group_ranks(mesh.groups.pp),
                    "context": dist.get_process_group_ranks(mesh.cp_group),
                    "replicas": dist.get_process_group_ranks(mesh.dp_cp_group),
                    "samples": dist.get_process_group_ranks(mesh.tp_cp_group),
                    "place": mesh.tp_cp_group.rank(),
                    "is_first_replica": mesh.is_first_replica,
                    "source": mesh.tp_cp_source_rank,
                    "reads": mesh.reads_data,
                    "first": mesh.is_first_stage,
                    "last": mesh.is_last_stage,
                }
            )
    return found


def test_groups_match_the_layout() -> None:
    layouts = [
        Layout(tensor=4),
        Layout(tensor=2, pipeline=2),
        Layout(data=4),
        Layout(tensor=2, data=2),
        Layout(tensor=2, context=2),
        Layout(context=2, data=2),
    ]
    for rank, found in enumerate(run_world(4, places, layouts)):
        for layout, place in zip(layouts, found, strict=True):
            coordinates = layout.coordinates(rank)
            assert place["rank"] == rank and place["coordinates"] == coordinates
            for axis in ("tensor", "context", "data", "pipeline"):
                assert place[axis] in layout.groups(axis) and rank in place[axis]
            assert place["replicas"] in layout.groups("context", "data") and place["is_first_replica"] == (
                rank == min(place["replicas"])
            )
            assert place["samples"] in layout.groups("tensor", "context")
            assert place["place"] == coordinates.context * layout.tensor + coordinates.tensor
            assert place["source"] == min(place["samples"]) and place["reads"] == (place["source"] == rank)
            assert place["first"] == (coordinates.pipeline == 0)
            assert place["last"] == (coordinates.pipeline == layout.pipeline - 1)


def timeouts(timeout_s: int) -> set[float]:
    """Return the timeouts of the mesh's groups in seconds, on one rank."""
    with open_mesh(Layout(tensor=2), device=Device("cpu"), timeout_s=timeout_s) as mesh:
        groups = (mesh.tp_group, mesh.dp_group, mesh.groups.pp)
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_groups_use_the_configured_timeout() -> None:
    assert run_world(2, timeouts, 90) == [{90.0}, {90.0}]


def test_wrong_world_size_raises() -> None:
    device = Device("cpu")
    with process_group(World.single_process(), device, timeout_s=60):
        with pytest.raises(ConfigError, match="needs 2 ranks; 1 joined"):
            with open_mesh(Layout(tensor=2), device=device):
                pass
        with open_mesh(Layout(), device=device) as mesh:
            assert mesh.layout == Layout()

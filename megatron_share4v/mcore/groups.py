"""Process groups of a Layout, held by a Mesh for the length of a `with` block.

megatron-core still reads its module `parallel_state` inside schedules and layers, so it is initialized here, from the
same Layout, and used nowhere else in the project.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.layout import Coordinates, Layout

ProcessGroup = dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """Coordinates of this rank in the layout, with its process groups."""

    layout: Layout
    device: Device
    rank: int
    coordinates: Coordinates
    groups: ProcessGroupCollection

    @property
    def tp_group(self) -> ProcessGroup:
        """Tensor-parallel group."""
        return self.groups.tp

    @property
    def dp_group(self) -> ProcessGroup:
        """Data-parallel group: ranks with the same weights and other samples."""
        return self.groups.dp

    @property
    def cp_group(self) -> ProcessGroup:
        """Context-parallel group: ranks that hold other positions of the same sequences."""
        return self.groups.cp

    @property
    def dp_cp_group(self) -> ProcessGroup:
        """Group of the DP and CP axes: all ranks that hold the same weights."""
        return self.groups.dp_cp

    @property
    def is_first_replica(self) -> bool:
        """True on DP rank 0, CP rank 0: one rank per set of replicated weights."""
        return self.coordinates.data == self.coordinates.context == 0

    @property
    def tp_cp_group(self) -> ProcessGroup:
        """Group of the TP and CP axes, TP fastest: ranks of one pipeline rank that work on the same samples."""
        return self.groups.tp_cp

    @property
    def tp_cp_source_rank(self) -> int:
        """Global rank of the first member of `tp_cp_group`, which reads the data and broadcasts it to the others."""
        return dist.get_global_rank(self.groups.tp_cp, 0)

    @property
    def reads_data(self) -> bool:
        """True on TP rank 0, CP rank 0, which reads text and broadcasts it."""
        return self.coordinates.tensor == self.coordinates.context == 0

    @property
    def is_first_stage(self) -> bool:
        """True on pipeline rank 0, which holds the vision tower, the projector and the embedding."""
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the last pipeline rank, which holds the head and the loss."""
        return self.coordinates.pipeline == self.layout.pipeline - 1


@contextlib.contextmanager
def open_mesh(layout: Layout, *, device: Device, timeout_s: int = 600) -> Iterator[Mesh]:
    """Create all groups of `layout` over the default process group; destroy them on exit.

    Raises ConfigError when the world size differs from the layout's. A collective of one of these groups that takes
    longer than `timeout_s` seconds ends the job.
    """
    if dist.get_world_size() != layout.world_size:
        raise ConfigError(f"layout {layout} needs {layout.world_size} ranks; {dist.get_world_size()} joined")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        # Core defaults to 30 minutes, whatever timeout the default group has.
        distributed_timeout_minutes=timeout_s / 60,
    )
    try:
        # Layers read the RNG tracker's state even though these models use no dropout.
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        rank = dist.get_rank()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        yield Mesh(layout=layout, device=device, rank=rank, coordinates=layout.coordinates(rank), groups=groups)
    finally:
        parallel_state.destroy_model_parallel()

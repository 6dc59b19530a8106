"""Process groups: a Layout becomes a Mesh, once, for the length of a block.

megatron-core still reads its module `parallel_state` inside schedules and layers, so it is initialised here, from the same Layout, and
named nowhere else in the project.
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
    """This rank's place in the layout, with the groups it talks to."""

    layout: Layout
    device: Device
    rank: int
    coordinates: Coordinates
    groups: ProcessGroupCollection

    @property
    def tp_group(self) -> ProcessGroup:
        """Ranks that share every matrix with this one."""
        return self.groups.tp

    @property
    def dp_group(self) -> ProcessGroup:
        """Ranks that do what this one does, with other samples."""
        return self.groups.dp

    @property
    def cp_group(self) -> ProcessGroup:
        """Ranks that hold other positions of the same sequences."""
        return self.groups.cp

    @property
    def dp_cp_group(self) -> ProcessGroup:
        """Ranks that hold the same weights as this one: those of the data and the context axis."""
        return self.groups.dp_cp

    @property
    def is_first_replica(self) -> bool:
        """Of those, one that can speak for all."""
        return self.coordinates.data == self.coordinates.context == 0

    @property
    def tp_cp_group(self) -> ProcessGroup:
        """Ranks of this pipeline rank that work on the same samples, tensor fastest: those of the tensor and the context axis."""
        return self.groups.tp_cp

    @property
    def tp_cp_source_rank(self) -> int:
        """Global rank of the first of them, which reads the data for the others."""
        return dist.get_global_rank(self.groups.tp_cp, 0)

    @property
    def reads_data(self) -> bool:
        """One rank per sample group reads text; the others receive."""
        return self.coordinates.tensor == self.coordinates.context == 0

    @property
    def is_first_stage(self) -> bool:
        """The vision tower, the projector and the embedding live here."""
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """The head and the loss live here."""
        return self.coordinates.pipeline == self.layout.pipeline - 1


@contextlib.contextmanager
def open_mesh(layout: Layout, *, device: Device, timeout_s: int = 600) -> Iterator[Mesh]:
    """Create all groups of `layout` over the default process group; ConfigError when its world size differs.

    A collective of one of these groups that waits longer than `timeout_s` seconds ends the job.
    """
    if dist.get_world_size() != layout.world_size:
        raise ConfigError(f"layout {layout} needs {layout.world_size} ranks; {dist.get_world_size()} joined")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        # Core's own default is 30 minutes, whatever the default group was told.
        distributed_timeout_minutes=timeout_s / 60,
    )
    try:
        # Layers ask the tracker for a state even when nothing is random (this project's models have no dropout).
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        rank = dist.get_rank()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        yield Mesh(layout=layout, device=device, rank=rank, coordinates=layout.coordinates(rank), groups=groups)
    finally:
        parallel_state.destroy_model_parallel()

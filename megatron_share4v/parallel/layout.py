"""Layout: the degrees of parallelism as plain integers, without processes or groups (mcore/groups.py creates those).

Ranks are numbered as in megatron-core: the tensor axis varies fastest, then context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.errors import ConfigError

Axis = Literal["tensor", "context", "data", "pipeline"]
AXES: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")


@dataclass(frozen=True)
class Coordinates:
    """Rank along each axis of the layout: TP, CP, DP and PP rank."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism; `virtual` is the number of model chunks per PP rank."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1
    virtual: int = 1

    @classmethod
    def for_world(cls, parallel: ParallelConfig, *, world_size: int) -> Layout:
        """Build the configured layout for `world_size` ranks; the data-parallel size follows.

        Raises ConfigError when the world size is not a multiple of tensor x pipeline x context.
        """
        replica = parallel.tensor * parallel.pipeline * parallel.context
        if world_size % replica:
            raise ConfigError(
                f"world size {world_size} is not a multiple of parallel.tensor {parallel.tensor} "
                f"x parallel.pipeline {parallel.pipeline} x parallel.context {parallel.context} = {replica}; "
                f"start a multiple of {replica} processes, or change the layout"
            )
        return cls(
            tensor=parallel.tensor,
            context=parallel.context,
            data=world_size // replica,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def num_stages(self) -> int:
        """Number of model chunks from the first layer to the last."""
        return self.pipeline * self.virtual

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of a global rank; 0 <= rank < world_size."""
        assert 0 <= rank < self.world_size, (rank, self)
        values = {}
        for axis in AXES:
            rank, values[axis] = divmod(rank, getattr(self, axis))
        return Coordinates(**values)

    def rank(self, coordinates: Coordinates) -> int:
        """Return the global rank of the coordinates (inverse of `coordinates`)."""
        rank = 0
        for axis in reversed(AXES):
            rank = rank * getattr(self, axis) + getattr(coordinates, axis)
        return rank

    def groups(self, *axes: Axis) -> list[list[int]]:
        """List the groups of ranks that differ along `axes` only, ordered by their first rank."""
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            coordinates = self.coordinates(rank)
            key = tuple(getattr(coordinates, other) for other in AXES if other not in axes)
            members.setdefault(key, []).append(rank)
        return sorted(members.values())

    def stage(self, *, pipeline_rank: int, chunk: int) -> int:
        """Return the stage, 0 .. num_stages - 1, of model chunk `chunk` on a PP rank (interleaved schedule)."""
        return chunk * self.pipeline + pipeline_rank

    def check_micro_batches(self, *, global_batch_size: int, micro_batch_size: int) -> int:
        """Return the number of micro-batches per DP rank and step; ConfigError when the batch does not divide."""
        slots = micro_batch_size * self.data
        if global_batch_size % slots:
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                f"train.micro_batch_size {micro_batch_size} x data-parallel size {self.data} = {slots}"
            )
        count = global_batch_size // slots
        if self.virtual > 1 and count % self.pipeline:
            raise ConfigError(
                f"the interleaved schedule needs micro-batches per rank ({count}) to be a multiple of "
                f"parallel.pipeline {self.pipeline}; change "
                f"train.global_batch_size {global_batch_size} or train.micro_batch_size {micro_batch_size}"
            )
        return count

    def __str__(self) -> str:
        pipeline = f"pipeline {self.pipeline} (virtual {self.virtual})"
        return f"tensor {self.tensor} x {pipeline} x data {self.data} x context {self.context}"

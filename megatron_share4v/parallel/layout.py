"""Layout: the degrees of parallelism as a value. Pure integers, no processes, no groups (mcore/groups.py makes those).

Ranks are numbered as megatron-core does: tensor fastest, then context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_share4v.config.run import ParallelConfig
from megatron_share4v.errors import ConfigError

Axis = Literal["tensor", "context", "data", "pipeline"]
AXES: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands on each axis."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism; `virtual` is the number of model chunks per pipeline rank."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1
    virtual: int = 1

    @classmethod
    def for_world(cls, parallel: ParallelConfig, *, world_size: int) -> Layout:
        """The layout that `parallel` asks for on `world_size` ranks; data parallel is what is left.

        Raises ConfigError when the world size is not a multiple of tensor x pipeline x context.
        """
        replica = parallel.tensor * parallel.pipeline * parallel.context
        if world_size % replica:
            raise ConfigError(
                f"world size {world_size} is not a multiple of parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} "
                f"x parallel.context {parallel.context} = {replica}; start a multiple of {replica} processes, or change the layout"
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
        """Ranks of the whole job."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def num_stages(self) -> int:
        """Model chunks from the first layer to the last."""
        return self.pipeline * self.virtual

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands; 0 <= rank < world_size."""
        assert 0 <= rank < self.world_size, (rank, self)
        values = {}
        for axis in AXES:
            rank, values[axis] = divmod(rank, getattr(self, axis))
        return Coordinates(**values)

    def rank(self, coordinates: Coordinates) -> int:
        """Inverse of `coordinates`."""
        rank = 0
        for axis in reversed(AXES):
            rank = rank * getattr(self, axis) + getattr(coordinates, axis)
        return rank

    def groups(self, *axes: Axis) -> list[list[int]]:
        """Ranks that differ on `axes` alone, one list per group, ordered by their first rank."""
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            coordinates = self.coordinates(rank)
            members.setdefault(tuple(getattr(coordinates, other) for other in AXES if other not in axes), []).append(
                rank
            )
        return sorted(members.values())

    def stage(self, *, pipeline_rank: int, chunk: int) -> int:
        """Position in the pipeline, 0 .. num_stages - 1, of model chunk `chunk` on `pipeline_rank` (interleaved numbering)."""
        return chunk * self.pipeline + pipeline_rank

    def check_micro_batches(self, *, global_batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches per data-parallel rank and step; ConfigError when the batch does not divide."""
        slots = micro_batch_size * self.data
        if global_batch_size % slots:
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size {micro_batch_size} "
                f"x data-parallel size {self.data} = {slots}"
            )
        count = global_batch_size // slots
        if self.virtual > 1 and count % self.pipeline:
            raise ConfigError(
                f"the interleaved schedule needs micro-batches per rank ({count}) to be a multiple of parallel.pipeline {self.pipeline}; "
                f"change train.global_batch_size {global_batch_size} or train.micro_batch_size {micro_batch_size}"
            )
        return count

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} (virtual {self.virtual}) x data {self.data} x context {self.context}"

"""The ranks of a job as torchrun starts them: launcher environment variables and the default process group.

This is the only reader of launcher environment variables. Without torchrun the job is a single process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.process import kill_on_parent_exit

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
JOB_END = "SLURM_JOB_END_TIME"


@dataclass(frozen=True)
class World:
    """Rank and world size of this process, in the job and on its node."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def single_process(cls) -> World:
        """Return a world of one process."""
        return cls(rank=0, size=1, local_rank=0, local_size=1)

    @classmethod
    def from_environment(cls) -> World:
        """Read the variables that torchrun sets; a single process when none is set, ConfigError when only some are."""
        missing = [name for name in VARIABLES if name not in os.environ]
        if len(missing) == len(VARIABLES):
            return cls.single_process()
        if missing:
            raise ConfigError(
                f"the launcher set some of {', '.join(VARIABLES)} but not {', '.join(missing)}; "
                "start with torchrun, or unset them all"
            )
        return cls(*(int(os.environ[name]) for name in VARIABLES))


def scheduled_end() -> float | None:
    """Read when Slurm (22.05 or later) ends this job, in seconds since 1970; None when it is not set.

    Raises ConfigError when the variable is not a number.
    """
    text = os.environ.get(JOB_END)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"{JOB_END} is {text!r}, which is no time in seconds since 1970; unset it, or set run.time_limit_minutes"
        ) from error


def kill_on_launcher_exit() -> None:
    """Have the kernel kill this rank when torchrun dies: an orphan would write beside the ranks of the next start."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        kill_on_parent_exit()


@contextlib.contextmanager
def process_group(world: World, device: Device, *, timeout_s: int) -> Iterator[None]:
    """Initialize the default process group for the length of the block."""
    timeout = timedelta(seconds=timeout_s)
    if world.size == 1:
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(device.backend, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    except BaseException:
        # NCCL would wait for collectives that the failed rank will never join; the process is about to end anyway.
        if device.backend == "gloo":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()

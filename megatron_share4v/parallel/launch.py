"""Joining the world that torchrun made, or a world of one without it. The only reader of launcher environment variables."""

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


@dataclass(frozen=True)
class World:
    """This process among its peers."""

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
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if len(missing) == len(names):
            return cls.single_process()
        if missing:
            raise ConfigError(
                f"the launcher set some of {', '.join(names)} but not {', '.join(missing)}; start with torchrun, or unset them all"
            )
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def job_end() -> float | None:
    """When the scheduler ends this job, in seconds since 1970 (Slurm says so since 22.05); None: it does not say. ConfigError when it says nonsense."""
    name = "SLURM_JOB_END_TIME"
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"{name} is {text!r}, which is no time in seconds since 1970; unset it, or set run.time_limit_minutes"
        ) from error


def kill_on_launcher_exit() -> None:
    """When torchrun is killed, so is this process: ranks that train on without it would write beside those of the next start. Linux alone can do it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        kill_on_parent_exit()


@contextlib.contextmanager
def process_group(world: World, device: Device, *, timeout_s: int) -> Iterator[None]:
    """The default process group, for the length of the block."""
    timeout = timedelta(seconds=timeout_s)
    if world.size == 1:
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(device.backend, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    except BaseException:
        # NCCL would first wait for collectives that the failed rank will never join; the process is about to end anyway.
        if device.backend == "gloo":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()

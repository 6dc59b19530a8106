"""A job has its run directory to itself (resilience/run_lock.py), and all its ranks know when it has not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_share4v.errors import Share4VError, disk_errors_as_config_error
from megatron_share4v.resilience.heartbeat import Heartbeat
from megatron_share4v.resilience.run_lock import held


@contextlib.contextmanager
def alone_in(directory: Path, *, rank: int) -> Iterator[None]:
    """Rank 0 holds the lock for the length of the block, and forgets where the ranks of an earlier job were. Collective.

    Raises RunDirectoryInUse, on all ranks, when another job holds it, and leaves everything as it is.
    """
    with contextlib.ExitStack() as stack:
        refusal: list[Share4VError | None] = [None]
        if rank == 0:
            try:
                with disk_errors_as_config_error(directory):
                    stack.enter_context(held(directory))
                    Heartbeat.clear(directory)
            except Share4VError as error:
                refusal = [error]
        # All end with the same exit code: a scheduler that sees another one from a rank that was killed would start the job again.
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise refusal[0]
        yield

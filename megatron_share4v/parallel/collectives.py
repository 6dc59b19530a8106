"""Collectives on Python objects, and the all-gather of tensors whose rows are interleaved over the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_share4v.errors import CheckpointError, Share4VError

T = TypeVar("T")


def gather_objects(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of every rank of `group` (None: all ranks) in rank order, on all of them. Collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T | None, *, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """Return the value of global rank `source` on every rank of `group`; other ranks may pass None. Collective."""
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=source, group=group)
    return values[0]


def run_on_rank0(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and return its result on every rank of `group` (None: all ranks). Collective.

    A user error of the action is raised on all ranks; an OSError becomes a CheckpointError, since files are what rank 0
    works on alone.
    """
    result: T | None = None
    failure: Share4VError | None = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except Share4VError as error:
            failure = error
        except OSError as error:
            failure = CheckpointError(
                f"{error.filename}: {error.strerror}; check the path, its permissions and the free space"
            )
    result, failure = broadcast_object((result, failure), group=group)
    if failure is not None:
        raise failure
    return cast(T, result)


def gather_interleaved_rows(
    parts: Sequence[torch.Tensor], counts: Sequence[int], *, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """All-gather several tensors whose rows are interleaved over a group of T ranks, in one collective.

    Tensor k has counts[k] rows in all; rank t passes its rows t, t + T, t + 2T, ... as `parts[k]` and receives the
    whole. Every rank must know `counts`. parts: [rows, ...], of one dtype and equal but for the first dimension.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    row_counts = [[len(range(first, count, size)) for count in counts] for first in range(size)]
    assert [len(part) for part in parts] == row_counts[rank], ([len(part) for part in parts], row_counts[rank])
    own_rows = torch.cat(list(parts))
    # Rank 0 has the most rows; all_gather needs the same number from every rank.
    padded = own_rows.new_zeros(sum(row_counts[0]), *own_rows.shape[1:])
    padded[: len(own_rows)] = own_rows
    received = [torch.empty_like(padded) for _ in range(size)]
    if padded.numel():
        dist.all_gather(received, padded, group=group)
    gathered = [own_rows.new_empty(count, *own_rows.shape[1:]) for count in counts]
    for first, (rows, lengths) in enumerate(zip(received, row_counts)):
        for tensor, part in zip(gathered, rows[: sum(lengths)].split(lengths)):
            tensor[first::size] = part
    return gathered

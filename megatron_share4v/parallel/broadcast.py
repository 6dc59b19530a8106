"""Broadcast of a record of tensors within a group: one header and one byte buffer, whatever the number of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16, torch.bool)
_MAX_DIMS = 4
_ABSENT = -1


def broadcast_tensors(
    tensors: Sequence[torch.Tensor | None] | None,
    *,
    count: int,
    source: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[torch.Tensor | None]:
    """Broadcast a list of tensors from global rank `source` to every rank of `group`; the result lies on `device`.

    `tensors` has `count` entries (None where there is no tensor) on the source and is None on other ranks. Every rank
    must know `count`; shapes and dtypes are sent in the header.
    """
    header = torch.zeros(count, 2 + _MAX_DIMS, dtype=torch.int64)
    if tensors is not None:
        assert len(tensors) == count, (len(tensors), count)
        for row, tensor in zip(header, tensors):
            row[0] = _ABSENT if tensor is None else _DTYPES.index(tensor.dtype)
            if tensor is not None:
                row[1] = tensor.dim()
                row[2 : 2 + tensor.dim()] = torch.tensor(tensor.shape)
    header = header.to(device)
    dist.broadcast(header, src=source, group=group)
    rows = header.tolist()
    sizes = [0 if row[0] == _ABSENT else math.prod(row[2 : 2 + row[1]]) * _DTYPES[row[0]].itemsize for row in rows]
    if tensors is not None:
        present = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
        parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in present]
        buffer = torch.cat(parts).to(device) if parts else torch.empty(0, dtype=torch.uint8, device=device)
    else:
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    if buffer.numel():
        dist.broadcast(buffer, src=source, group=group)
    received: list[torch.Tensor | None] = []
    for row, part in zip(rows, buffer.split(sizes)):
        # clone: a slice may start at an address that is not aligned for its dtype
        received.append(None if row[0] == _ABSENT else part.clone().view(_DTYPES[row[0]]).view(row[2 : 2 + row[1]]))
    return received

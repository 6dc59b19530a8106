"""From the loader to the ranks: one rank per tensor group reads, the others receive; middle pipeline stages need no data at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_share4v.data.loader import Role, batches
from megatron_share4v.data.encode import Encoder
from megatron_share4v.data.index import Index
from megatron_share4v.data.plan import Plan, StepItems
from megatron_share4v.data.sample import Batch
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.parallel.broadcast import broadcast_tensors

_FIELDS = [field.name for field in fields(Batch)]
NO_DATA = Batch(**{name: None for name in _FIELDS})


@dataclass(frozen=True)
class StepData:
    """What one optimizer step trains on, as this rank sees it."""

    items: StepItems
    batches: list[Batch]
    wait_s: float
    """Time that this rank waited for its data."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One prepared data set with the order in which it is read."""

    index: Index
    plan: Plan
    encoder: Encoder
    num_workers: int
    prefetch: int


def feed(source: Source, *, mesh: Mesh, start_step: int, stop_step: int) -> Iterator[StepData]:
    """The data of steps start_step .. stop_step - 1, on this rank's device."""
    layout, role = mesh.layout, Role(first=mesh.holds_first_stage, last=mesh.holds_last_stage)
    reader = None
    if mesh.reads_data and (role.first or role.last):
        reader = batches(
            source.index,
            source.plan,
            source.encoder,
            role=role,
            start_step=start_step,
            stop_step=stop_step,
            data_rank=mesh.coordinates.data,
            data_size=layout.data,
            num_workers=source.num_workers,
            prefetch=source.prefetch,
        )
    for step in range(start_step, stop_step):
        items = source.plan.step(step)
        count = len(source.plan.micro_batches(items, data_rank=mesh.coordinates.data, data_size=layout.data))
        started = time.perf_counter()
        local = next(reader) if reader is not None else None
        if role.first or role.last:
            local = _share(local, count=count, mesh=mesh)
        yield StepData(items, local or [NO_DATA] * count, time.perf_counter() - started)


def _share(local: list[Batch] | None, *, count: int, mesh: Mesh) -> list[Batch]:
    """Hand the reading rank's micro-batches to its tensor group."""
    device = mesh.device.torch_device
    if mesh.layout.tensor == 1:
        assert local is not None
        return [Batch(**{name: _moved(getattr(batch, name), device) for name in _FIELDS}) for batch in local]
    tensors = [getattr(batch, name) for batch in local for name in _FIELDS] if local is not None else None
    width = len(_FIELDS)
    received = broadcast_tensors(tensors, count=count * width, source=mesh.tensor_source, group=mesh.tensor_group, device=device)
    return [Batch(**dict(zip(_FIELDS, received[i * width : (i + 1) * width]))) for i in range(count)]


def _moved(tensor, device):
    return None if tensor is None else tensor.to(device, non_blocking=True)

"""From the loader to the ranks: who reads what, which samples failed, and one complete batch per rank. Middle pipeline stages read nothing.

On the first stage every rank of a sample group (tensor and context axis) decodes its share of the images; one of them, and one of the last stage's,
reads the text. Of what they share, each keeps the positions that are its own (data/loading/context_parallel.py).
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.loading.loader import (
    EMPTY_BATCH,
    ImageSharding,
    LoadedMicroBatch,
    Loader,
    LoaderOptions,
    StageRole,
)
from megatron_share4v.data.loading.prefetch import prefetch_to_device
from megatron_share4v.data.records import Batch
from megatron_share4v.data.sampling.blend import BlendedIndex
from megatron_share4v.data.sampling.sampler import GlobalBatch, MicroBatch, Sampler
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.quarantine import Fault
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.parallel.broadcast import broadcast_tensors
from megatron_share4v.parallel.collectives import gather_interleaved_rows

_TEXT = ("token_ids", "image_slots", "target_rows", "targets")  # every rank has the segments from the plan


@dataclass(frozen=True)
class StepData:
    """What one optimizer step trains on, as this rank sees it."""

    items: GlobalBatch
    batches: list[Batch]
    wait_s: float
    """Time that this rank waited for its data."""
    faulty_rows: frozenset[int] = frozenset()
    """Samples of the step, in all data-parallel ranks, that some rank could not read; equal on all ranks."""
    faults: tuple[Fault, ...] = field(default=())
    """Those that this rank could not read, with reasons."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One prepared data set with the order in which it is read."""

    index: Index | BlendedIndex
    plan: Sampler
    encoder: Encoder
    options: LoaderOptions


def feed(
    source: Source, *, mesh: Mesh, start_step: int, stop_step: int, without: Container[int] = ()
) -> Iterator[StepData]:
    """The data of steps start_step .. stop_step - 1, on this rank's device. All ranks must ask for the same steps.

    Of the steps in `without` nothing is read; they have no batches.
    """
    loader = _open_loader(source, mesh)
    reading = prefetch_to_device(loader.steps(start_step, stop_step, skip=without), mesh.device) if loader else None
    try:
        for step in range(start_step, stop_step):
            items = source.plan.global_batch(step)
            if step in without:
                yield StepData(items, [], 0.0)
                continue
            planned = source.plan.micro_batches(items, data_rank=mesh.coordinates.data, data_size=mesh.layout.data)
            started = time.perf_counter()
            readings = next(reading) if reading is not None else None
            faults = tuple(fault for one in readings or [] for fault in one.faults)
            faulty = _agree(items, faults, mesh)
            batches = _batches(source, readings, planned, loader, faulty=faulty, mesh=mesh)
            yield StepData(items, batches, time.perf_counter() - started, faulty, faults)
    finally:
        if reading is not None:
            reading.close()


def _open_loader(source: Source, mesh: Mesh) -> Loader | None:
    """None on ranks that read nothing."""
    role = StageRole(first=mesh.is_first_stage, last=mesh.is_last_stage and mesh.reads_data)
    if not (role.first or role.last):
        source.plan.micro_batches_per_rank(data_size=mesh.layout.data)
        return None
    return Loader(
        source.index,
        source.plan,
        source.encoder,
        role=role,
        data_rank=mesh.coordinates.data,
        data_size=mesh.layout.data,
        options=source.options,
        image_sharding=ImageSharding(mesh.tp_cp_group.rank(), mesh.tp_cp_group.size())
        if role.first
        else ImageSharding(),
    )


def _agree(items: GlobalBatch, faults: Sequence[Fault], mesh: Mesh) -> frozenset[int]:
    """The rows of the step that any rank of the world could not read.

    An image fails where it is decoded, on the first stage; its labels must be masked on the last. One byte per sample goes round, every step,
    failure or not: all ranks make the same calls, so nothing can wait for a message that nobody sends.
    """
    rows = [fault.row for fault in faults]
    flags = torch.from_numpy(np.isin(items.rows, rows).astype(np.uint8)).to(mesh.device.torch_device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return frozenset(items.rows[flags.cpu().numpy().astype(bool)].tolist())


def _batches(
    source: Source,
    readings: list[LoadedMicroBatch] | None,
    planned: Sequence[MicroBatch],
    loader: Loader | None,
    *,
    faulty: frozenset[int],
    mesh: Mesh,
) -> list[Batch]:
    """This rank's part of the micro-batches, from what it and the others of its sample group have read."""
    local = [reading.batch for reading in readings or []]
    if faulty and loader is not None and local[0].targets is not None:
        hit = [faulty.intersection(micro_batch.rows) for micro_batch in planned]
        local = [
            loader.mask_samples(batch, plan, rows=rows) if rows else batch
            for batch, plan, rows in zip(local, planned, hit)
        ]
    whole = [EMPTY_BATCH] * len(planned)
    if mesh.is_first_stage or mesh.is_last_stage:
        whole = _share_text(local if mesh.reads_data else None, count=len(planned), mesh=mesh)
    if mesh.is_first_stage:
        pixels = _share_pixels(
            local, [source.index.rows["n_img"][list(plan.rows)].sum() for plan in planned], mesh=mesh
        )
        whole = [replace(batch, pixels=images) for batch, images in zip(whole, pixels)]
    rank, size = mesh.coordinates.context, mesh.layout.context
    return [
        slice_for_context_parallel(
            replace(batch, segments=plan.segments), rank=rank, size=size, sequence_length=plan.sequence_length
        )
        for batch, plan in zip(whole, planned)
    ]


def _share_text(local: list[Batch] | None, *, count: int, mesh: Mesh) -> list[Batch]:
    """Hand what the reading rank has read, but for the pixels, to its sample group."""
    device = mesh.device.torch_device
    if mesh.tp_cp_group.size() == 1:
        assert local is not None
        return [replace(batch, **{name: _moved(getattr(batch, name), device) for name in _TEXT}) for batch in local]
    tensors = [getattr(batch, name) for batch in local for name in _TEXT] if local is not None else None
    width = len(_TEXT)
    received = broadcast_tensors(
        tensors, count=count * width, source=mesh.tp_cp_source_rank, group=mesh.tp_cp_group, device=device
    )
    return [replace(EMPTY_BATCH, **dict(zip(_TEXT, received[i * width : (i + 1) * width]))) for i in range(count)]


def _share_pixels(local: list[Batch], counts: Sequence[int], *, mesh: Mesh) -> list[torch.Tensor]:
    """The images of each micro-batch from the shares of the sample group."""
    device = mesh.device.torch_device
    parts = [_moved(batch.pixels, device) for batch in local]
    if mesh.tp_cp_group.size() == 1:
        return parts
    return gather_interleaved_rows(parts, [int(count) for count in counts], group=mesh.tp_cp_group)


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)

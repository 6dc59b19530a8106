"""Prefetch to a GPU: while it runs one step, the next one is read, pinned and copied to it. Not needed on the CPU."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from megatron_share4v.data.loading.loader import LoadedMicroBatch
from megatron_share4v.data.records import Batch
from megatron_share4v.parallel.device import Device

Item = TypeVar("Item")
_END = object()


def prefetch_to_device(
    steps: Generator[list[LoadedMicroBatch], None, None], device: Device
) -> Generator[list[LoadedMicroBatch], None, None]:
    """Iterate over the same micro-batches with their tensors on `device`; on the CPU return `steps` itself."""
    return _copy_to_device(steps, device) if device.kind == "cuda" else steps


def iterate_in_thread(items: Iterator[Item], *, depth: int = 1) -> Iterator[Item]:
    """Iterate over `items` in a thread, up to `depth` items ahead.

    An exception of `items` is raised here, at its position in the order.
    """
    ready: queue.SimpleQueue = queue.SimpleQueue()
    free_slots = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        try:
            while free_slots.acquire() and not stopped.is_set():
                ready.put((next(items, _END), None))
        except BaseException as error:
            ready.put((_END, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            free_slots.release()
            yield item
    finally:
        stopped.set()
        free_slots.release()
        thread.join()


def _copy_to_device(
    steps: Generator[list[LoadedMicroBatch], None, None], device: Device
) -> Generator[list[LoadedMicroBatch], None, None]:
    """Copy each step on a side stream, one step ahead of the consumer."""
    stream = torch.cuda.Stream(device.torch_device)

    def copies() -> Iterator[tuple[list[LoadedMicroBatch], torch.cuda.Event]]:
        torch.cuda.set_device(device.torch_device)  # the current device is per thread
        for readings in steps:
            with torch.cuda.stream(stream):
                moved = [
                    replace(reading, batch=_copy_pinned(reading.batch, device.torch_device)) for reading in readings
                ]
                yield moved, stream.record_event()

    for readings, copied in iterate_in_thread(copies()):
        current = torch.cuda.current_stream(device.torch_device)
        current.wait_event(copied)
        for reading in readings:
            for tensor in _tensors(reading.batch).values():
                tensor.record_stream(current)
        yield readings


def _copy_pinned(batch: Batch, device: torch.device) -> Batch:
    """Copy the tensors of a batch through pinned memory, without a host sync."""
    moved: dict[str, Any] = {
        name: tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)
        for name, tensor in _tensors(batch).items()
    }
    return replace(batch, **moved)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Tensor fields of a batch, by name."""
    return {
        field.name: value for field in fields(Batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }

"""Reading ahead of a GPU: while it works on one step, the next one is fetched, pinned and copied to it. On the CPU nothing of this is needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch

from megatron_share4v.data.loading.loader import LoadedMicroBatch
from megatron_share4v.data.records import Batch
from megatron_share4v.parallel.device import Device

Item = TypeVar("Item")
_END = object()


def prefetch_to_device(steps: Iterator[list[LoadedMicroBatch]], device: Device) -> Iterator[list[LoadedMicroBatch]]:
    """The same readings with their tensors on `device`; on the CPU `steps` itself."""
    return _copied(steps, device) if device.kind == "cuda" else steps


def iterate_in_thread(items: Iterator[Item], *, depth: int = 1) -> Iterator[Item]:
    """The same items, made by a thread up to `depth` items ahead. What it raises is raised here, at its place."""
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        try:
            while room.acquire() and not stopped.is_set():
                ready.put((next(items, _END), None))
        except BaseException as error:
            ready.put((_END, error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="reading-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()


def _copied(steps: Iterator[list[LoadedMicroBatch]], device: Device) -> Iterator[list[LoadedMicroBatch]]:
    stream = torch.cuda.Stream(device.torch_device)

    def copies() -> Iterator[tuple[list[LoadedMicroBatch], torch.cuda.Event]]:
        torch.cuda.set_device(device.torch_device)  # each thread has its own current device
        for readings in steps:
            with torch.cuda.stream(stream):
                moved = [
                    replace(reading, batch=_pinned_copy(reading.batch, device.torch_device)) for reading in readings
                ]
                yield moved, stream.record_event()

    for readings, copied in iterate_in_thread(copies()):
        current = torch.cuda.current_stream(device.torch_device)
        current.wait_event(copied)
        for reading in readings:
            for tensor in _tensors(reading.batch).values():
                tensor.record_stream(current)
        yield readings


def _pinned_copy(batch: Batch, device: torch.device) -> Batch:
    moved = {
        name: tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)
        for name, tensor in _tensors(batch).items()
    }
    return replace(batch, **moved)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        field.name: value for field in fields(Batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }

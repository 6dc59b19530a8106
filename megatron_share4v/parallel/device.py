"""The device of a rank, chosen once at start and passed as an argument, and host-to-device copies."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Device:
    """The device that a rank computes on, with the process-group backend that goes with it."""

    kind: Literal["cpu", "cuda"]
    index: int = 0

    @classmethod
    def detect(cls, *, local_rank: int, local_world_size: int) -> Device:
        """Choose CUDA when every local rank can have a GPU of its own, else the CPU."""
        if torch.cuda.is_available() and torch.cuda.device_count() >= local_world_size:
            torch.cuda.set_device(local_rank)
            return cls("cuda", local_rank)
        return cls("cpu")

    @property
    def torch_device(self) -> torch.device:
        """The torch.device for tensor factories and `.to`."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)

    @property
    def backend(self) -> str:
        """The torch.distributed backend: gloo or nccl."""
        return "gloo" if self.kind == "cpu" else "nccl"

    def synchronize(self) -> None:
        """Wait for queued device work, before a clock is read. Host sync."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.index)

    def peak_memory_bytes(self) -> int:
        """Peak memory so far: of the CUDA allocator, or the resident set of the process on the CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.index)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def describe(self) -> str:
        """Device and backend for the start-up line."""
        return "cpu (gloo)" if self.kind == "cpu" else f"{torch.cuda.get_device_name(self.index)} (nccl)"


def to_device_async(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device` without a host sync, through pinned memory on CUDA."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)

"""The device of one rank: a CUDA GPU where there is one, else the CPU. Decided once at start and passed as an argument; and the way to it."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Device:
    """What a rank computes on and the process-group backend that goes with it."""

    kind: Literal["cpu", "cuda"]
    index: int = 0

    @classmethod
    def detect(cls, *, local_rank: int, local_world_size: int) -> Device:
        """CUDA when every local rank can have a GPU of its own, else the CPU."""
        if torch.cuda.is_available() and torch.cuda.device_count() >= local_world_size:
            torch.cuda.set_device(local_rank)
            return cls("cuda", local_rank)
        return cls("cpu")

    @property
    def torch_device(self) -> torch.device:
        """For tensor factories and `.to`."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)

    @property
    def backend(self) -> str:
        """torch.distributed backend."""
        return "gloo" if self.kind == "cpu" else "nccl"

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock read afterwards is true."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.index)

    def peak_memory_bytes(self) -> int:
        """Largest memory so far: of the allocator on CUDA, of the whole process (resident) on the CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.index)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def describe(self) -> str:
        """One phrase for the start-up line."""
        return "cpu (gloo)" if self.kind == "cpu" else f"{torch.cuda.get_device_name(self.index)} (nccl)"


def to_device_async(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, made on the host, on `device`, without a wait of the host for it: from memory that is pinned, which others are copied to first."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)

"""Snapshot of one rank's part of a checkpoint, written at once or later by a background thread."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_share4v.errors import CheckpointError

WRITER_THREADS = 2


class HostBuffers:
    """Host memory that a rank's tensors are copied into, reused by every save: pinned memory is slow to allocate."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy_to_host(self, name: str, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Copy `tensors` to the host, over the copies of the previous call with the same name.

        Shapes must be the same at every call with one name.
        """
        copied = []
        for index, tensor in enumerate(tensors):
            key = f"{name} {index}"
            if key not in self._buffers:
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copied.append(self._buffers[key].copy_(tensor, non_blocking=True))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def full_buffer(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return an fp32 buffer of that shape, the same one at every call with the same name.

        Not pinned: most of its content comes from other hosts.
        """
        if name not in self._buffers:
            self._buffers[name] = torch.empty(shape)
        return self._buffers[name]


class ErrorRecordingFileSystem(FileSystem):
    """File system that records write errors.

    torch's writer threads lose them and take a checkpoint that lacks tensors for complete.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Exception] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """Open a file; record the error when writing it fails."""
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except Exception as error:
            self.failures.append(_root_cause(error))


class ErrorRaisingWriter(torch_checkpoint.FileSystemWriter):
    """Storage writer that raises on the rank whose files could not be written."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, thread_count=WRITER_THREADS)
        self.fs: ErrorRecordingFileSystem = ErrorRecordingFileSystem()

    def write_data(self, plan: torch_checkpoint.SavePlan, planner: torch_checkpoint.SavePlanner) -> Any:
        """Write this rank's tensors."""
        written = super().write_data(plan, planner)
        self._check()
        assert len(written.value()) == len(plan.items), (len(written.value()), len(plan.items))
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the metadata of all ranks' tensors."""
        super().finish(metadata, results)
        self._check()

    def _check(self) -> None:
        if self.fs.failures:
            raise self.fs.failures[0]


def _root_cause(error: Exception) -> Exception:
    """Return the OSError behind `error`.

    torch raises `unexpected pos` when it closes a file that the system refused to write.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


class CheckpointSnapshot(TorchDistSaveShardedStrategy):
    """Tensors of this rank in core's torch_dist format, written by threads of this process.

    Core's own writer forks processes below a manager that imports the main script again, and hangs when one of them
    dies.
    """

    def __init__(
        self,
        buffers: HostBuffers | None,
        *,
        live: Iterable[torch.Tensor],
        fill: Callable[[dist.ProcessGroup | None], None],
    ) -> None:
        """Keep where to copy and what to complete; `save` fills the snapshot.

        `live`: tensors that training goes on changing; they are copied into `buffers`. Without `buffers` nothing is
        copied, and the snapshot must be written before training continues. `fill` runs before anything is written, with
        the process group of the write.
        """
        super().__init__("torch_dist", 1)
        self._buffers, self._live = buffers, {tensor.untyped_storage().data_ptr() for tensor in live}
        self._directory, self._fill = Path(), fill
        self._content: dict[str, Any] = {}

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        """Keep the tensors of which this rank is the main replica; core calls it after validating the sharding."""
        tensors = [tensor for tensor in nested_values(sharded_state_dict) if is_main_replica(tensor.replica_id)]
        if self._buffers is not None:
            # Tensors gathered only for this save need no copy.
            changing = [tensor for tensor in tensors if tensor.data.untyped_storage().data_ptr() in self._live]
            for tensor, copy in zip(
                changing, self._buffers.copy_to_host("weights", [tensor.data for tensor in changing])
            ):
                tensor.data = copy
        owned: dict[str, list[ShardedTensor]] = defaultdict(list)
        for tensor in tensors:
            owned[tensor.key].append(tensor)
        self._directory, self._content = Path(checkpoint_dir), mcore_to_pyt_state_dict(owned)

    def write(self, group: dist.ProcessGroup | None) -> None:
        """Write the snapshot.

        Collective over `group`, which no other thread may use meanwhile; None: the default group.

        Raises CheckpointError, on all ranks.
        """
        self._fill(group)
        try:
            torch_checkpoint.save(
                self._content,
                storage_writer=ErrorRaisingWriter(self._directory),
                planner=MCoreSavePlanner(flatten_state_dict=False),
                process_group=group,
            )
        except torch_checkpoint.CheckpointException as error:
            failures = (
                "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items())
                or "another rank failed"
            )
            raise CheckpointError(
                f"{self._directory}: cannot be written ({failures}); free space or check the file system, "
                "then start again"
            ) from error
        finally:
            self._content = {}

"""Global tensors in the files of a dist_checkpointing directory (format torch_dist), for conversion.

Read and written one at a time and without ranks. The files are those that `mcore.dist_checkpoint` reads and writes at
any layout. Completeness of directories is handled by checkpoint/.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pickled into .metadata: the format names this class
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_share4v.errors import CheckpointError

COMMON = "common.pt"
DESCRIPTION = ".metadata"


class AppendableFile(Protocol):
    """File-like object that tensors are appended to."""

    def write(self, data: Any) -> int:
        """Append `data`."""

    def flush(self) -> None:
        """Flush buffered bytes."""


@dataclass(frozen=True)
class ByteRange:
    """Byte range of one full tensor in a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Chunk:
    starts: tuple[int, ...]
    byte_range: ByteRange


@dataclass(frozen=True)
class StoredTensor:
    """Global tensor of a checkpoint, whatever the number of ranks that wrote it."""

    directory: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]

    def read(self) -> torch.Tensor:
        """Return the full tensor. Raises CheckpointError with its name when its bytes cannot be read."""
        if len(self.chunks) == 1:
            return self._read(self.chunks[0])
        full = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            part = self._read(chunk)
            full[tuple(slice(start, start + size) for start, size in zip(chunk.starts, part.shape))] = part
        return full

    def _read(self, chunk: _Chunk) -> torch.Tensor:
        path = self.directory / chunk.byte_range.file
        try:
            with open(path, "rb", buffering=0) as file:
                window = cast(IO[bytes], _ByteRangeFile(file, chunk.byte_range))
                return torch.load(window, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path}: {self.name} cannot be read ({reason}); use another checkpoint, or copy this one again"
            ) from error


class _ByteRangeFile(io.RawIOBase):
    """A byte range of a file as a file of its own; values are read straight into the destination."""

    def __init__(self, file: io.RawIOBase, byte_range: ByteRange) -> None:
        self._file, self._range, self._position = file, byte_range, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._range.length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        left = memoryview(buffer).cast("B")[: max(0, self._range.length - self._position)]
        total = 0
        self._file.seek(self._range.offset + self._position)
        while total < len(left) and (count := self._file.readinto(left[total:])):
            total += count
        self._position += total
        return total


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint `directory` by its global name, optimizer state included.

    Reads metadata only.
    """
    try:
        described = torch_checkpoint.FileSystemReader(directory).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{directory}: its {DESCRIPTION} cannot be read ({error}); use another checkpoint, or copy this one again"
        ) from error
    assert described.storage_data is not None
    chunks: dict[str, list[_Chunk]] = {}
    for index, info in described.storage_data.items():
        byte_range = ByteRange(info.relative_path, info.offset, info.length)
        chunks.setdefault(index.fqn, []).append(_Chunk(tuple(index.offset or ()), byte_range))
    return {
        name: StoredTensor(directory, name, tuple(entry.size), entry.properties.dtype, tuple(chunks[name]))
        for name, entry in described.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def write_tensor(file: AppendableFile, tensor: torch.Tensor) -> None:
    """Append the bytes of `tensor` in the format that `stored_tensors` and dist_checkpointing read."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    with _without_crc():
        torch.save(tensor, cast(IO[bytes], file))


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Disable the format's checksums, which take as long as the manifest's SHA-256 of the same bytes."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def describe_tensors(
    directory: Path,
    byte_ranges: Mapping[str, ByteRange],
    *,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
) -> None:
    """Write the metadata that makes `directory` a dist_checkpointing directory.

    `byte_ranges` is the location of the data of `tensors` (name, shape, dtype).
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, shape, dtype in tensors:
        start, size, byte_range = torch.Size([0] * len(shape)), torch.Size(shape), byte_ranges[name]
        chunk = ChunkStorageMetadata(offsets=start, sizes=size)
        entries[name] = TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[chunk])
        storage[MetadataIndex(name, start, 0)] = _StorageInfo(byte_range.file, byte_range.offset, byte_range.length)
    with open(directory / DESCRIPTION, "wb") as file:
        pickle.dump(Metadata(state_dict_metadata=entries, storage_data=storage), file)
    torch.save({}, directory / COMMON)
    save_config(CheckpointingConfig("torch_dist"), str(directory))

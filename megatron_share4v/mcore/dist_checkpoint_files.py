"""Global tensors in the files of a dist_checkpointing directory (format torch_dist), one at a time and without ranks: what conversion needs.

The files are those that `mcore.checkpointing` reads and writes at any layout. Which directories are whole is checkpoint/'s business.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pickled into .metadata: the format names this class
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_share4v.errors import CheckpointError

COMMON = "common.pt"
DESCRIPTION = ".metadata"


class Appended(Protocol):
    """What bytes are written to, one piece after the other."""

    def write(self, data: Any) -> int:
        """As a file's."""

    def flush(self) -> None:
        """As a file's."""


@dataclass(frozen=True)
class Placed:
    """Where the bytes of one whole tensor lie."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Chunk:
    starts: tuple[int, ...]
    place: Placed


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of a checkpoint, whatever the number of ranks that wrote it."""

    directory: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]

    def read(self) -> torch.Tensor:
        """The whole tensor. Raises CheckpointError that names it when its bytes cannot be read."""
        if len(self.chunks) == 1:
            return self._read(self.chunks[0])
        whole = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            part = self._read(chunk)
            whole[tuple(slice(start, start + size) for start, size in zip(chunk.starts, part.shape))] = part
        return whole

    def _read(self, chunk: _Chunk) -> torch.Tensor:
        path = self.directory / chunk.place.file
        try:
            with open(path, "rb", buffering=0) as file:
                return torch.load(_Window(file, chunk.place), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path}: {self.name} cannot be read ({reason}); use another checkpoint, or copy this one again"
            ) from error


class _Window(io.RawIOBase):
    """One tensor's part of a file as a file, so that its values are read to where they stay."""

    def __init__(self, file: io.RawIOBase, place: Placed) -> None:
        self._file, self._place, self._position = file, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._place.length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        left = memoryview(buffer).cast("B")[: max(0, self._place.length - self._position)]
        total = 0
        self._file.seek(self._place.offset + self._position)
        while total < len(left) and (count := self._file.readinto(left[total:])):
            total += count
        self._position += total
        return total


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint `directory` by its global name, optimizer state included; nothing but their description is read."""
    try:
        described = torch_checkpoint.FileSystemReader(directory).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{directory}: its {DESCRIPTION} cannot be read ({error}); use another checkpoint, or copy this one again"
        ) from error
    assert described.storage_data is not None
    places: dict[str, list[_Chunk]] = {}
    for index, info in described.storage_data.items():
        place = Placed(info.relative_path, info.offset, info.length)
        places.setdefault(index.fqn, []).append(_Chunk(tuple(index.offset or ()), place))
    return {
        name: StoredTensor(directory, name, tuple(entry.size), entry.properties.dtype, tuple(places[name]))
        for name, entry in described.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def write_tensor(file: Appended, tensor: torch.Tensor) -> None:
    """Append the bytes of `tensor` alone, in the format that `stored_tensors` and dist_checkpointing read."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    with _without_crc():
        torch.save(tensor, file)


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """The manifest has a SHA-256 of the same bytes; the format's own checksums would take as long again."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def describe_tensors(
    directory: Path, placed: Mapping[str, Placed], *, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]
) -> None:
    """Write what makes `directory`, with the data of `tensors` (name, shape, dtype) where `placed` says, a dist_checkpointing directory."""
    entries: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, shape, dtype in tensors:
        start, size, place = torch.Size([0] * len(shape)), torch.Size(shape), placed[name]
        chunk = ChunkStorageMetadata(offsets=start, sizes=size)
        entries[name] = TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[chunk])
        storage[MetadataIndex(name, start, 0)] = _StorageInfo(place.file, place.offset, place.length)
    with open(directory / DESCRIPTION, "wb") as file:
        pickle.dump(Metadata(state_dict_metadata=entries, storage_data=storage), file)
    torch.save({}, directory / COMMON)
    save_config(CheckpointingConfig("torch_dist"), str(directory))

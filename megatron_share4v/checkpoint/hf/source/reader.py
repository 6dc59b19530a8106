"""Open safetensors and PyTorch .bin files, sharded or not, as lazy tensors. Knows no models.

Safetensors are read by offset, so memory holds only the requested tensor; of .bin files one shard at a time is mapped.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, merge_disjoint, tensor_bytes
from megatron_share4v.errors import ConversionError
from megatron_share4v.files import read_text

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
AGAIN = "copy or download it again"


def has_weights(directory: Path) -> bool:
    """Return whether `directory` holds a model's weights under one of the usual names."""
    return bool(_weight_files(directory))


def open_weights_directory(directory: Path) -> dict[str, LazyTensor]:
    """Open the weights of a model directory, without adapters and projector files.

    Raises ConversionError for missing or damaged files.
    """
    files = _weight_files(directory)
    if not files:
        raise ConversionError(
            f"{directory}: holds no weights ({', '.join(WHOLE)}, or shards with an index); "
            "give the directory of a model"
        )
    mapped = _MappedFile()
    tensors = merge_disjoint(*(_open(path, mapped) for path in files))
    index = next(
        (directory / name for name, whole in zip(INDEXES, WHOLE) if files[0].suffix == Path(whole).suffix), None
    )
    if index is not None and index.is_file():
        for name, shard in read_json(index).get("weight_map", {}).items():
            if name not in tensors:
                raise ConversionError(f"{index}: missing tensor: {name} should be in {shard} and is not; {AGAIN}")
    return tensors


def open_weights_file(path: Path) -> dict[str, LazyTensor]:
    """Open one .safetensors or .bin file. Raises ConversionError when it is missing or damaged."""
    return _open(path, _MappedFile())


def _open(path: Path, mapped: _MappedFile) -> dict[str, LazyTensor]:
    if not path.is_file():
        raise ConversionError(f"{path}: there is no such file; {AGAIN}")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path}: is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path, mapped)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises ConversionError."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds {type(content).__name__} where an object is expected; {AGAIN}")
    return content


def _weight_files(directory: Path) -> list[Path]:
    """List the weight files, preferring safetensors where a directory has both formats."""
    for index, whole, shards in zip(INDEXES, WHOLE, SHARDS):
        if (directory / index).is_file():
            return [
                directory / name for name in sorted(set(read_json(directory / index).get("weight_map", {}).values()))
            ]
        if (directory / whole).is_file():
            return [directory / whole]
        if found := sorted(directory.glob(shards)):
            count = int(found[0].stem.rpartition("-")[2])
            if len(found) != count:
                raise ConversionError(
                    f"{directory}: has {len(found)} of {count} weight shards ({found[0].name}, ...); {AGAIN}"
                )
            return found
    return []


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise ConversionError(f"{path}: truncated: {size} bytes do not hold its header; {AGAIN}")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            described = [
                (name, DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in entries.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{path}: its header is no safetensors header ({error!r}); {AGAIN}") from error
    tensors = {}
    for name, dtype, shape, begin, end in described:
        if 8 + length + end > size:
            raise ConversionError(
                f"{path}: truncated: {name} ends at byte {8 + length + end}, the file has {size}; {AGAIN}"
            )
        if end - begin != torch.Size(shape).numel() * dtype.itemsize:
            raise ConversionError(f"{path}: {name} of shape {shape} and {dtype} has {end - begin} bytes; {AGAIN}")
        tensors[name] = LazyTensor(shape, dtype, str(path), _FileRange(path, 8 + length + begin, shape, dtype))
    return tensors


class _FileRange:
    """Reader of one tensor's bytes in a file (a `RowReader`)."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype

    def slice_rows(self, start: int, stop: int) -> _FileRange:
        """Return a reader of rows start .. stop - 1."""
        size = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        return _FileRange(self.path, self.offset + start * size, (stop - start, *self.shape[1:]), self.dtype)

    def __call__(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        unread = tensor_bytes(tensor)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                while unread:
                    count = file.readinto(unread)
                    if not count:
                        raise ConversionError(f"{self.path}: was truncated while it was read; {AGAIN}")
                    unread = unread[count:]
        except OSError as error:
            raise ConversionError(
                f"{self.path}: cannot be read ({error.strerror}); check its file system, or {AGAIN}"
            ) from error
        return tensor


class _MappedFile:
    """Cache of the last .bin file that was read: only one of several shards stays mapped."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def tensors(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a file by name; the previous file is unmapped."""
        if path != self._path:
            self._path, self._tensors = None, {}
            self._tensors = _load_bin(path)
            self._path = path
        return self._tensors


def _open_bin(path: Path, mapped: _MappedFile) -> dict[str, LazyTensor]:
    def reader(name: str) -> Callable[[], torch.Tensor]:
        return lambda: mapped.tensors(path)[name].clone(memory_format=torch.contiguous_format)

    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, str(path), reader(name))
        for name, tensor in mapped.tensors(path).items()
    }


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        # torch < 1.6 wrote files without zip format, which cannot be mapped.
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: holds objects other than tensors, which are not read ({str(error).splitlines()[0]}); {AGAIN}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConversionError(f"{path}: truncated or damaged ({str(error).splitlines()[0]}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds {type(content).__name__} where named tensors are expected; {AGAIN}")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"{path}: {name} is {type(value).__name__}, not a tensor; give a file of named tensors"
            )
    return content

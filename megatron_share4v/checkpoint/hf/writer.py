"""Write lazy tensors to safetensors files: shards of bounded size with an index, one tensor in memory at a time.

The safetensors library needs all tensors of a file in memory; the format is a JSON header followed by the bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_share4v.checkpoint.hf.source.reader import DTYPES
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, LazyTensors, prefetch_tensors, tensor_bytes
from megatron_share4v.checkpoint.resumable_writer import HashingWriter, OutputFile

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def split_into_shards(tensors: LazyTensors, *, max_bytes: int) -> list[dict[str, LazyTensor]]:
    """Split tensors into shards in their order; a tensor larger than `max_bytes` is a shard of its own."""
    result: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if result[-1] and size + tensor.nbytes > max_bytes:
            result.append({})
            size = 0
        result[-1][name] = tensor
        size += tensor.nbytes
    return result


def safetensors_files(tensors: LazyTensors, *, max_bytes: int, folder: str = "") -> list[OutputFile]:
    """Describe the files of a model's weights below `folder`: one file, or shards."""
    shards = split_into_shards(tensors, max_bytes=max_bytes)
    return [
        OutputFile(
            folder + name,
            sum(tensor.nbytes for tensor in shard.values()),
            functools.partial(_write_tensors, shard),
            hashed=False,
        )
        for name, shard in zip(_shard_names(len(shards)), shards)
    ]


def write_index(directory: Path, tensors: LazyTensors, *, max_bytes: int) -> None:
    """Write model.safetensors.index.json if `safetensors_files` makes more than one file."""
    shards = split_into_shards(tensors, max_bytes=max_bytes)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(_shard_names(len(shards)), shards) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: LazyTensors) -> None:
    """Write all tensors to one file."""
    with open(path, "wb") as file:
        _write_tensors(tensors, file, lambda count: None)


def _shard_names(count: int) -> Sequence[str]:
    return (
        [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )


def _write_tensors(
    tensors: LazyTensors, file: BinaryIO | HashingWriter, progress: Callable[[int], Any]
) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the library aligns its data too
    file.write(len(text).to_bytes(8, "little") + text)
    for _, values in prefetch_tensors(tensors.items()):
        file.write(tensor_bytes(values))
        progress(values.nbytes)
    return {}

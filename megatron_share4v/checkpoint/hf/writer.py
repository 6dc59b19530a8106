"""Lazy tensors to safetensors files: shards of bounded size with an index, each tensor written as it is read.

The library writes a file from tensors that are all in memory; the format (a JSON header, then the bytes) is simple enough to write in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_share4v.checkpoint.hf.reader import DTYPES
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, LazyTensors, prefetch_tensors, tensor_bytes
from megatron_share4v.checkpoint.resumable_writer import HashingWriter, OutputFile

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def split_into_shards(tensors: LazyTensors, *, max_bytes: int) -> list[dict[str, LazyTensor]]:
    """Cut in the order of the names' appearance; a tensor larger than `max_bytes` is a shard of its own."""
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
    """The files of a model's weights, below `folder`: one, or shards."""
    cut = split_into_shards(tensors, max_bytes=max_bytes)
    return [
        OutputFile(folder + name, sum(tensor.nbytes for tensor in shard.values()), _writer(shard), hashed=False)
        for name, shard in zip(_names(len(cut)), cut)
    ]


def write_index(directory: Path, tensors: LazyTensors, *, max_bytes: int) -> None:
    """model.safetensors.index.json, when `model_parts` makes more than one file."""
    cut = split_into_shards(tensors, max_bytes=max_bytes)
    if len(cut) > 1:
        weight_map = {name: file for file, shard in zip(_names(len(cut)), cut) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: LazyTensors) -> None:
    """All of them to one file."""
    with open(path, "wb") as file:
        _writer(tensors)(file, lambda count: None)


def _names(count: int) -> Sequence[str]:
    return (
        [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )


def _writer(tensors: LazyTensors) -> Callable[[BinaryIO | HashingWriter, Callable[[int], Any]], dict[str, Any]]:
    def write(file: BinaryIO | HashingWriter, progress: Callable[[int], Any]) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the library aligns its data too
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in prefetch_tensors(tensors.items()):
            file.write(tensor_bytes(tensor))
            progress(tensor.nbytes)
        return {}

    return write

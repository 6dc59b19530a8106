"""Lazy tensors to safetensors files: shards of bounded size with an index, each tensor written as it is read.

The library writes a file from tensors that are all in memory; the format (a JSON header, then the bytes) is simple enough to write in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_share4v.checkpoint.hf.reader import DTYPES
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, Tensors, bytes_of, read_ahead
from megatron_share4v.checkpoint.resumable_writer import Output, Part

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shards(tensors: Tensors, *, max_bytes: int) -> list[dict[str, LazyTensor]]:
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


def model_parts(tensors: Tensors, *, max_bytes: int, folder: str = "") -> list[Part]:
    """The files of a model's weights, below `folder`: one, or shards."""
    cut = shards(tensors, max_bytes=max_bytes)
    return [
        Part(folder + name, sum(tensor.nbytes for tensor in shard.values()), _writer(shard), hashed=False)
        for name, shard in zip(_names(len(cut)), cut)
    ]


def write_index(directory: Path, tensors: Tensors, *, max_bytes: int) -> None:
    """model.safetensors.index.json, when `model_parts` makes more than one file."""
    cut = shards(tensors, max_bytes=max_bytes)
    if len(cut) > 1:
        weight_map = {name: file for file, shard in zip(_names(len(cut)), cut) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Tensors) -> None:
    """All of them to one file."""
    with open(path, "wb") as file:
        _writer(tensors)(file, lambda count: None)


def _names(count: int) -> Sequence[str]:
    return (
        [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )


def _writer(tensors: Tensors) -> Callable[[BinaryIO | Output, Callable[[int], Any]], dict[str, Any]]:
    def write(file: BinaryIO | Output, progress: Callable[[int], Any]) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the library aligns its data too
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in read_ahead(tensors.items()):
            file.write(bytes_of(tensor))
            progress(tensor.nbytes)
        return {}

    return write

"""Tensors that are read on demand, so that conversion holds few of them in memory, and SHA-256 hashes of their values.

A model of any layout is a mapping from names to lazy tensors; merging, slicing and casting return new lazy tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from megatron_share4v.errors import ConversionError

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@runtime_checkable
class RowReader(Protocol):
    """A `LazyTensor.read` that can also read a range of rows without the others."""

    def slice_rows(self, start: int, stop: int) -> Callable[[], torch.Tensor]:
        """Return a reader of rows start .. stop - 1."""


@dataclass(frozen=True)
class LazyTensor:
    """Shape, dtype and origin (for messages) of a tensor, and the function that reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    read: Callable[[], torch.Tensor] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """Return the same tensor, rounded to `dtype` when it is read."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, read=lambda: self.read().to(dtype))

    def slice_rows(self, start: int, stop: int) -> LazyTensor:
        """Return rows start .. stop - 1; a `RowReader` reads no other rows."""
        shape = (stop - start, *self.shape[1:])
        if isinstance(self.read, RowReader):
            return replace(self, shape=shape, read=self.read.slice_rows(start, stop))
        return replace(self, shape=shape, read=lambda: self.read()[start:stop])


LazyTensors = Mapping[str, LazyTensor]


def cast_checked(name: str, tensor: LazyTensor, dtype: str) -> LazyTensor:
    """Return `tensor` rounded to `dtype` (fp32, bf16, fp16).

    Reading it raises ConversionError where a finite value would become infinite.
    """
    rounded = tensor.cast(FLOATS[dtype])
    if rounded.dtype == tensor.dtype:
        return tensor

    def read() -> torch.Tensor:
        values = tensor.read()
        result = values.to(rounded.dtype)
        if not torch.isfinite(result).all() and bool((torch.isinf(result) & torch.isfinite(values)).any()):
            largest = torch.finfo(rounded.dtype).max
            raise ConversionError(
                f"{tensor.origin}: {name} has values beyond {dtype}'s {largest:.6g}; "
                "use a dtype that holds them, fp32 or bf16"
            )
        return result

    return replace(rounded, read=read)


class SplitCache:
    """Cache of the last tensor that was split, so that consecutive reads of its parts read it once."""

    def __init__(self) -> None:
        self._name = ""
        self._parts: tuple[torch.Tensor, ...] = ()

    def get(self, name: str, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Return the parts of `name`, calling `make` when they are not the last ones."""
        if name != self._name:
            self._name, self._parts = "", ()  # frees the old ones before the new ones come
            self._parts = make()
            self._name = name
        return self._parts


def merge_disjoint(*parts: LazyTensors) -> dict[str, LazyTensor]:
    """Merge mappings. Raises ConversionError for a name that occurs twice, with both origins."""
    result: dict[str, LazyTensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if name in result:
                raise ConversionError(
                    f"{name} occurs twice: in {result[name].origin} and in {tensor.origin}; leave one of them out"
                )
            result[name] = tensor
    return result


def check_float_dtypes(tensors: LazyTensors) -> None:
    """Raise ConversionError for the first tensor whose dtype is not fp32, bf16 or fp16 (quantised weights)."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_NAMES:
            known = ", ".join(FLOATS)
            raise ConversionError(
                f"{tensor.origin}: wrong dtype: {name} is {tensor.dtype}; supported are {known}: "
                "use weights that are not quantised"
            )


def check_not_empty(tensors: LazyTensors) -> None:
    """Raise ConversionError for the first tensor without values, which DeepSpeed ZeRO-3 leaves in place of weights."""
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise ConversionError(
                f"{tensor.origin}: empty tensor: {name} has shape {tensor.shape}: DeepSpeed ZeRO-3 saved it without "
                "gathering its parts; save again with stage3_gather_16bit_weights_on_model_save, or convert its "
                "checkpoint with zero_to_fp32.py"
            )


def prefetch_tensors(tensors: Iterable[tuple[str, LazyTensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor); a thread reads the next tensor while the caller works on this one."""

    def load(item: tuple[str, LazyTensor]) -> tuple[str, torch.Tensor]:
        name, lazy = item
        tensor = lazy.read().contiguous()
        assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype), (name, tensor.shape, tensor.dtype, lazy)
        return name, tensor

    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in tensors:
            following = pool.submit(load, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the values of a contiguous tensor as bytes, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of the values."""
    return hashlib.sha256(tensor_bytes(tensor.contiguous())).hexdigest()


def combine_component_hashes(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, str]]) -> dict[str, str]:
    """Return one SHA-256 per model component, over (name, shape, dtype, digest) of its tensors, sorted by name.

    Equal weights give equal hashes, whatever files, layouts or processes they went through.
    """
    hashes: dict[str, hashlib._Hash] = {}
    for name in sorted(tensors):
        shape, dtype, digest = tensors[name]
        line = f"{name} {list(shape)} {dtype} {digest}\n"
        hashes.setdefault(name.partition(".")[0], hashlib.sha256()).update(line.encode())
    return {component: found.hexdigest() for component, found in hashes.items()}


def hash_components(tensors: LazyTensors) -> dict[str, str]:
    """Read all tensors and return one SHA-256 per model component (see `combine_component_hashes`)."""
    return combine_component_hashes(
        {
            name: (tuple(tensor.shape), tensor.dtype, tensor_sha256(tensor))
            for name, tensor in prefetch_tensors(tensors.items())
        }
    )

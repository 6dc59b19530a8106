"""Tensors that are read when they are asked for, so that conversion holds few of them in memory, and the hashes of what they contain.

A model of any layout is a mapping from names to lazy tensors; merging, cutting and casting make new lazy tensors.
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
    """What reads a tensor, and can read some of its rows alone."""

    def slice_rows(self, start: int, stop: int) -> Callable[[], torch.Tensor]:
        """What reads rows start .. stop - 1."""


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a tensor, where it comes from (for messages), and how it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    read: Callable[[], torch.Tensor] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """The same tensor, rounded to `dtype` when it is read."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, read=lambda: self.read().to(dtype))

    def slice_rows(self, start: int, stop: int) -> LazyTensor:
        """Rows start .. stop - 1 alone; of what can read those alone, no others are read."""
        shape = (stop - start, *self.shape[1:])
        if isinstance(self.read, RowReader):
            return replace(self, shape=shape, read=self.read.slice_rows(start, stop))
        return replace(self, shape=shape, read=lambda: self.read()[start:stop])


LazyTensors = Mapping[str, LazyTensor]


def cast_checked(name: str, tensor: LazyTensor, dtype: str) -> LazyTensor:
    """`tensor` rounded to `dtype` (fp32, bf16, fp16); a number that it cannot hold is a ConversionError when it is read, not an infinity."""
    rounded = tensor.cast(FLOATS[dtype])
    if rounded.dtype == tensor.dtype:
        return tensor

    def read() -> torch.Tensor:
        values = tensor.read()
        result = values.to(rounded.dtype)
        if not torch.isfinite(result).all() and bool((torch.isinf(result) & torch.isfinite(values)).any()):
            largest = torch.finfo(rounded.dtype).max
            raise ConversionError(
                f"{tensor.origin}: {name} has values beyond {dtype}'s {largest:.6g}; use a dtype that holds them, fp32 or bf16"
            )
        return result

    return replace(rounded, read=read)


class SplitCache:
    """Reads a tensor of which several parts are wanted once, as long as they are asked for one after the other."""

    def __init__(self) -> None:
        self._name = ""
        self._parts: tuple[torch.Tensor, ...] = ()

    def get(self, name: str, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """What `make` gave for `name`."""
        if name != self._name:
            self._name, self._parts = "", ()  # frees the old ones before the new ones come
            self._parts = make()
            self._name = name
        return self._parts


def merge_disjoint(*parts: LazyTensors) -> dict[str, LazyTensor]:
    """All tensors together. Raises ConversionError naming a tensor that is there twice, and both places."""
    result: dict[str, LazyTensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if name in result:
                raise ConversionError(
                    f"{name} is there twice: in {result[name].origin} and in {tensor.origin}; leave one of them out"
                )
            result[name] = tensor
    return result


def check_float_dtypes(tensors: LazyTensors) -> None:
    """ConversionError naming the first tensor whose values are no floating-point numbers of 16 or 32 bits (quantised weights)."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_NAMES:
            known = ", ".join(FLOATS)
            raise ConversionError(
                f"{tensor.origin}: wrong dtype: {name} is {tensor.dtype}; read are {known}: use weights that are not quantised"
            )


def prefetch_tensors(tensors: Iterable[tuple[str, LazyTensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor): the next one is read by another thread while the caller works on this one."""

    def load(item: tuple[str, LazyTensor]) -> tuple[str, torch.Tensor]:
        name, lazy = item
        tensor = lazy.read().contiguous()
        assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype), (name, tensor.shape, tensor.dtype, lazy)
        return name, tensor

    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in tensors:
            following = pool.submit(load, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a contiguous tensor as bytes, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of the values."""
    return hashlib.sha256(tensor_bytes(tensor.contiguous())).hexdigest()


def combine_component_hashes(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, str]]) -> dict[str, str]:
    """One SHA-256 per component of the model, over the names, shapes, dtypes and digests of its tensors in the order of their names.

    Equal weights give equal digests whatever files, layouts or processes they went through.
    """
    hashes: dict[str, hashlib._Hash] = {}
    for name in sorted(tensors):
        shape, dtype, digest = tensors[name]
        line = f"{name} {list(shape)} {dtype} {digest}\n"
        hashes.setdefault(name.partition(".")[0], hashlib.sha256()).update(line.encode())
    return {component: found.hexdigest() for component, found in hashes.items()}


def hash_components(tensors: LazyTensors) -> dict[str, str]:
    """`component_digests` of tensors that are read for it."""
    return combine_component_hashes(
        {
            name: (tuple(tensor.shape), tensor.dtype, tensor_sha256(tensor))
            for name, tensor in prefetch_tensors(tensors.items())
        }
    )

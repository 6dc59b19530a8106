"""Invertible maps between Hugging Face tensors and one global Megatron tensor. No names and no files here.

Each maps P Hugging Face tensors (parts) to one Megatron tensor and back without arithmetic: both directions are bitwise
exact. W input width, G key/value groups, q query heads per group, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


class Transform(Protocol):
    """Invertible map: `to_megatron(to_hf(x)) == x` and `to_hf(to_megatron(parts)) == parts`.

    Tensors on the meta device give shapes only.
    """

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Build the global Megatron tensor from its parts."""

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split a global Megatron tensor into its parts."""


@dataclass(frozen=True)
class Identity:
    """One part, unchanged."""

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[...] -> [...]"""
        (tensor,) = parts
        return tensor

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[...] -> [...]"""
        return (tensor,)


@dataclass(frozen=True)
class SqueezeLeading:
    """One part, without its `count` leading dimensions of 1."""

    count: int

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[1, ..., R, W] -> [R, W]"""
        (tensor,) = parts
        return tensor.reshape(tensor.shape[self.count :])

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[R, W] -> [1, ..., R, W]"""
        return (tensor.reshape(*(1,) * self.count, *tensor.shape),)


@dataclass(frozen=True)
class ConcatRows:
    """Concatenate `count` equal shapes along the rows: gate and up, which tensor parallelism splits separately."""

    count: int = 2

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """count x [R, ...] -> [count * R, ...]"""
        return torch.cat(tuple(parts))

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[count * R, ...] -> count x [R, ...]"""
        return tensor.chunk(self.count)


@dataclass(frozen=True)
class InterleaveQKV:
    """Query, key, value <-> one matrix (or bias) with the rows of each key/value group together: q queries, key, value.

    Tensor-parallel ranks then get whole groups (Ainslie et al. 2023, GQA; megatron-core's `linear_qkv`).
    """

    groups: int
    queries_per_group: int
    head_dim: int

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[G q d, W], [G d, W], [G d, W] -> [G (q + 2) d, W]; the same without W for biases."""
        by_group = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[G (q + 2) d, W] -> [G q d, W], [G d, W], [G d, W]"""
        sizes = (self.queries_per_group * self.head_dim, self.head_dim, self.head_dim)
        return tuple(part.flatten(0, 1) for part in tensor.unflatten(0, (self.groups, sum(sizes))).split(sizes, dim=1))


@dataclass(frozen=True)
class PadVocabulary:
    """Pad the vocabulary with rows of zeros up to the padded size; the head masks them, so they stay zero."""

    rows: int
    padded: int

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[V, W] -> [padded, W]"""
        (tensor,) = parts
        if self.padded == self.rows:  # padding by zero rows would copy
            return tensor
        return F.pad(tensor, (0, 0, 0, self.padded - self.rows))

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[padded, W] -> [V, W]"""
        return (tensor[: self.rows],)

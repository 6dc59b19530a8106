"""Invertible maps between the tensors of a Hugging Face layout and one of our global tensors. No names and no files here.

Each turns P parts of theirs into one tensor of ours and back, without arithmetic, so that both directions are bitwise exact.
W input width, G key/value groups, q query heads per group, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


class Transform(Protocol):
    """`to_ours(to_theirs(x)) == x` and `to_theirs(to_ours(parts)) == parts`; shapes alone can be had on the meta device."""

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One global tensor from the parts."""

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of one global tensor."""


@dataclass(frozen=True)
class Identity:
    """One part, as it is."""

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[...] -> [...]"""
        (tensor,) = parts
        return tensor

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[...] -> [...]"""
        return (tensor,)


@dataclass(frozen=True)
class ConcatRows:
    """`count` equal parts above each other: gate and up, each of which tensor parallelism splits for itself."""

    count: int = 2

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """count x [R, ...] -> [count * R, ...]"""
        return torch.cat(tuple(parts))

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[count * R, ...] -> count x [R, ...]"""
        return tensor.chunk(self.count)


@dataclass(frozen=True)
class InterleaveQKV:
    """Query, key, value <-> one matrix (or bias) in which the rows of a key/value group stand together: its q queries, its key, its value.

    Whole groups can then be given to tensor-parallel ranks (Ainslie et al. 2023, GQA; megatron-core's `linear_qkv`).
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
    """Rows of zeros after the vocabulary, up to the padded size; the head masks them, so they never leave zero."""

    rows: int
    padded: int

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[V, W] -> [padded, W]"""
        (tensor,) = parts
        if self.padded == self.rows:  # padding with nothing would copy
            return tensor
        return F.pad(tensor, (0, 0, 0, self.padded - self.rows))

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[padded, W] -> [V, W]"""
        return (tensor[: self.rows],)

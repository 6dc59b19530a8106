"""Compare a Hugging Face model with a checkpoint: names, shapes and bits of every tensor, and the likely cause of
differences.

Logits are compared in evaluate/agreement.py, which can run a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_share4v.checkpoint.compatibility import model_differences
from megatron_share4v.checkpoint.hf.exporter import OpenCheckpoint, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import megatron_tensors
from megatron_share4v.checkpoint.hf.source.model import HfModel, HfSource, open_hf_model
from megatron_share4v.checkpoint.hf.transforms import ConcatRows, InterleaveQKV
from megatron_share4v.checkpoint.hf.vocab import ADDED_ROWS, added_vocab_rows
from megatron_share4v.checkpoint.hf.weight_map import WeightMapping, check_megatron_weights
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, combine_component_hashes, tensor_sha256
from megatron_share4v.checkpoint.manifest import verify_files as verify_files
from megatron_share4v.errors import ConversionError

SHOWN = 5
CHUNK = 1 << 22
"""Values compared at once, which bounds the memory of intermediate results."""
BF16_STEP = 2**-7  # distance of neighbouring bf16 values, relative to the smaller


@dataclass(frozen=True)
class TensorDifference:
    """A checkpoint tensor whose values differ from those of the Hugging Face model."""

    mapping: WeightMapping
    where: tuple[int, ...]
    """Index of the first different value in the checkpoint tensor."""
    values: tuple[float, float]
    """Values at that index: the Hugging Face model's and the checkpoint's."""
    count: int
    largest: float
    is_small: bool
    """True when rounding to bf16 explains every difference."""

    def __str__(self) -> str:
        hf, megatron = self.values
        total = torch.Size(self.mapping.shape).numel()
        return (
            f"{self.mapping.name} (from {', '.join(self.mapping.hf_names)}): {self.count} of {total} values differ, "
            f"by up to {self.largest:.3g}; first at {list(self.where)}: {hf!r} there, {megatron!r} in the checkpoint"
        )


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Summary of a comparison without differences."""

    tensors: int
    names: int
    """Hugging Face tensors that they were built from."""
    rounded: int
    """Tensors equal only after rounding one side to the other's dtype."""
    unused: int
    """Unused tower weights that the checkpoint stores; they are equal too."""
    not_stored: tuple[str, ...]
    """Unused tower weights that the checkpoint does not store; exports get freshly initialised ones."""
    added: int
    """Tensors whose rows after the vocabulary were compared with those of an export."""
    weights: dict[str, str]
    """SHA-256 of each component of the checkpoint."""

    def __str__(self) -> str:
        how = f", {self.rounded} of them after rounding" if self.rounded else ", bit for bit"
        lines = [
            f"{self.tensors} tensors equal, built from {self.names} Hugging Face tensors{how}; "
            f"{self.unused} unused tower tensors stored and equal"
        ]
        if self.added:
            lines.append(f"  rows after the vocabulary: equal to an export's, in {self.added} tensors")
        if self.not_stored:
            lines.append(
                f"  unused tower tensors that the checkpoint does not store; exports get freshly initialised ones: "
                f"{', '.join(self.not_stored)}"
            )
        return "\n".join([*lines, *(f"  {component}: sha256 {digest}" for component, digest in self.weights.items())])


def verify_conversion(paths: HfSource, checkpoint: Path) -> VerifyReport:
    """Compare every tensor of a Hugging Face model and a checkpoint.

    Raises ConversionError with the first differences and their likely cause, CheckpointError for a damaged checkpoint.
    """
    model, opened = open_hf_model(paths), open_checkpoint(checkpoint)
    verify_files(opened.path, contents=True)
    if not model.has_projector:
        raise ConversionError(f"{paths.directory}: missing tensor: has no projector to compare with the checkpoint's")
    _check_models(model, opened)
    _check_names(model, opened)
    hf = megatron_tensors(model, seed=0)
    different, digests, rounded = [], {}, 0
    for mapping in model.mappings:
        expected, found = hf[mapping.name].read(), opened.weights[mapping.name].read()
        digests[mapping.name] = (mapping.shape, found.dtype, tensor_sha256(found))
        rounded += expected.dtype != found.dtype
        if not _same_rounded(expected, found):
            rounded_either_way = ((expected.to(found.dtype), found), (expected, found.to(expected.dtype)))
            different.append(
                min(
                    (_difference(mapping, *pair) for pair in rounded_either_way),
                    key=lambda difference: difference.count,
                )
            )
    stored = {name: tensor for name, tensor in model.unused().items() if f"vision.{name}" in opened.unused}
    others = [f"{name} (not computed, stored for exports) differs" for name in _different_unused(stored, opened)]
    others += _different_added_rows(model, opened)
    if different or others:
        raise ConversionError(_report(paths, opened, different, others, hf))
    return VerifyReport(
        tensors=len(model.mappings),
        names=sum(len(mapping.hf_names) for mapping in model.mappings),
        rounded=rounded,
        unused=len(stored),
        not_stored=tuple(name for name in model.unused() if name not in stored),
        added=len(model.added_rows),
        weights=combine_component_hashes(digests),
    )


def _same_rounded(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether rounding one tensor to the other's dtype gives the other.

    Neither of fp16 and bf16 is coarser for all values, so both directions are tried.
    """
    return _same_bits(one.to(other.dtype), other) or _same_bits(other.to(one.dtype), one)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Compared as integers: NaN equals itself, and 0 differs from -0.
    whole = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def _difference(mapping: WeightMapping, hf: torch.Tensor, megatron: torch.Tensor) -> TensorDifference:
    """Describe where two tensors differ.

    Works in chunks: the differences of a large tensor in fp32 would take several times its memory.
    """
    first, count, largest, is_small = 0, 0, 0.0, True
    pairs = zip(hf.reshape(-1).split(CHUNK), megatron.reshape(-1).split(CHUNK))
    for number, (one, other) in enumerate(pairs):
        different = (one != other) | (one.signbit() != other.signbit())
        here = int(different.sum())
        if here and not count:
            first = number * CHUNK + int(different.view(torch.uint8).argmax())  # of equal values, the first one
        count += here
        gap = (one.float() - other.float()).abs()
        largest = max(largest, float(gap.max()))
        is_small &= bool((gap <= BF16_STEP * torch.maximum(one.abs(), other.abs()).float()).all())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), hf.shape))
    return TensorDifference(mapping, where, (float(hf[where]), float(megatron[where])), count, largest, is_small)


def _different_unused(stored: dict[str, LazyTensor], opened: OpenCheckpoint) -> Iterator[str]:
    for name, tensor in stored.items():
        own = opened.unused[f"vision.{name}"]
        if own.shape != tensor.shape or not _same_rounded(own.read(), tensor.read()):
            yield name


def _different_added_rows(model: HfModel, opened: OpenCheckpoint) -> Iterator[str]:
    """Yield a message for added vocabulary rows that differ from those of an export of the checkpoint."""
    for part, hf in model.added_rows.items():
        stored = opened.unused.get(ADDED_ROWS[part]) if opened.manifest.state.step == 0 else None
        values = opened.weights[f"language.{part}.weight"].read()[: model.config.language.vocab_size]
        if not _same_rounded(hf.read(), added_vocab_rows(values, hf.shape[0], imported=stored)):
            kind = "the mean of the others" if stored is None or stored.shape[0] != hf.shape[0] else "the imported ones"
            yield f"{part}: its {hf.shape[0]} rows after the vocabulary are not {kind}, which an export would have"


def _check_models(model: HfModel, opened: OpenCheckpoint) -> None:
    found = model_differences(model.config, opened.config.model)
    if found:
        listed = "; ".join(f"{key} {hf!r} there, {megatron!r} in the checkpoint" for key, hf, megatron in found)
        raise ConversionError(f"{opened.path}: is of another model: {listed}")


def _check_names(model: HfModel, opened: OpenCheckpoint) -> None:
    """Check that the checkpoint has exactly the tensors of the model, with their shapes."""
    try:
        table = check_megatron_weights(opened.weights, model.config, naming=model.naming)
    except ConversionError as error:
        raise ConversionError(f"{opened.path}: {error}") from error
    extra = sorted(opened.weights.keys() - {mapping.name for mapping in table})
    if extra:
        raise ConversionError(
            f"{opened.path}: unexpected: {', '.join(extra[:SHOWN])}: "
            "no tensor of the model that its configuration describes"
        )


def _report(
    paths: HfSource,
    opened: OpenCheckpoint,
    different: list[TensorDifference],
    others: list[str],
    hf: dict[str, LazyTensor],
) -> str:
    lines = [f"{opened.path} and {paths.directory} differ in {len(different) + len(others)} tensors:"]
    lines += [f"  {difference}" for difference in different[:SHOWN]]
    if len(different) > SHOWN:
        lines.append(f"  and {len(different) - SHOWN} more")
    lines += [f"  {line}" for line in others[:SHOWN]]
    if different:
        lines.append(f"likely cause: {_cause(different, hf, opened)}")
    return "\n".join(lines)


def _cause(different: list[TensorDifference], hf: dict[str, LazyTensor], opened: OpenCheckpoint) -> str:
    names = [difference.mapping.name for difference in different]
    if "vision.class_embedding" in names and not opened.weights["vision.class_embedding"].read().any():
        return "a missing class token: vision.class_embedding is all zeros in the checkpoint"
    if set(names) <= {"language.embedding.weight", "language.head.weight"}:
        return "vocabulary padding: only embedding and head differ, so rows were cut, added or overwritten"
    components = {name.partition(".")[0] for name in names}
    first = different[0]
    expected, found = hf[first.mapping.name].read(), opened.weights[first.mapping.name].read()
    for cause, change in _changes(first.mapping):
        if _same_rounded(change(expected), found):
            return cause
    if all(difference.is_small for difference in different):
        return "rounding: one side went through a coarser dtype"
    if components == {"vision"}:
        total = sum(name.startswith("vision.") for name in hf)
        return f"the wrong tower: {len(names)} of its {total} tensors differ and nothing else does"
    if components == {"projector"}:
        return "another projector: nothing else differs"
    return "other weights: one side was trained further, or comes from another model"


def _changes(mapping: WeightMapping) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Yield common mistakes of converters, as functions of the correct tensor."""
    transform = mapping.transform
    if isinstance(transform, InterleaveQKV):

        def permuted(tensor: torch.Tensor) -> torch.Tensor:
            query, key, value = transform.to_hf(tensor)
            return transform.to_megatron(
                [_rope_permuted(query, transform.head_dim), _rope_permuted(key, transform.head_dim), value]
            )

        def returned(tensor: torch.Tensor) -> torch.Tensor:
            query, key, value = transform.to_hf(tensor)
            return transform.to_megatron(
                [_rope_returned(query, transform.head_dim), _rope_returned(key, transform.head_dim), value]
            )

        cause = (
            "rope permutation: queries and keys are in the other order of rotary pairs "
            "(Meta's interleaved against Hugging Face's halves)"
        )
        yield cause, permuted
        yield cause, returned
        yield (
            "query, key and value are concatenated instead of interleaved by head",
            lambda tensor: torch.cat(transform.to_hf(tensor)),
        )
    elif isinstance(transform, ConcatRows):
        yield "gate and up are swapped", lambda tensor: torch.cat(transform.to_hf(tensor)[::-1])
    if len(mapping.shape) == 2 and mapping.shape[0] == mapping.shape[1]:
        yield "the matrix is transposed", lambda tensor: tensor.t()


def _rope_permuted(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _rope_returned(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)

"""Whether a model of another layout and a checkpoint of ours are the same: names, shapes and bits, with the likely cause of what differs.

Logits are compared where a model can be run (evaluate/agreement.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_share4v.checkpoint.compatibility import model_differences
from megatron_share4v.checkpoint.hf.exporter import OpenCheckpoint, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import megatron_tensors
from megatron_share4v.checkpoint.hf.source import HfModel, HfSource, open_hf_model
from megatron_share4v.checkpoint.hf.transforms import ConcatRows, InterleaveQKV
from megatron_share4v.checkpoint.hf.vocab import ADDED_ROWS, added_vocab_rows
from megatron_share4v.checkpoint.hf.weight_map import WeightMapping, check_megatron_weights
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, combine_component_hashes, tensor_sha256
from megatron_share4v.checkpoint.manifest import verify_files as verify_files
from megatron_share4v.errors import ConversionError

SHOWN = 5
CHUNK = 1 << 22
"""Values of a tensor that are looked at together where several intermediate results are needed."""
BF16_STEP = 2**-7  # between neighbours, relative to the smaller


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of ours that is not what the other side makes of it."""

    mapping: WeightMapping
    where: tuple[int, ...]
    """Index of the first different value, in our tensor."""
    values: tuple[float, float]
    """Theirs and ours, there."""
    count: int
    largest: float
    is_small: bool
    """Every value is off by no more than rounding to bf16 explains."""

    def __str__(self) -> str:
        theirs, ours = self.values
        total = torch.Size(self.mapping.shape).numel()
        return (
            f"{self.mapping.name} (from {', '.join(self.mapping.hf_names)}): {self.count} of {total} values differ, by up to {self.largest:.3g}; "
            f"first at {list(self.where)}: {theirs!r} there, {ours!r} in the checkpoint"
        )


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was compared and found equal."""

    tensors: int
    names: int
    """Tensors of theirs that made them, each once."""
    rounded: int
    """Of the tensors, those whose dtypes differ and of which one is the other, rounded."""
    unused: int
    """Of the tower's weights that are not computed, those that the checkpoint carries; they are equal too."""
    not_carried: tuple[str, ...]
    """Those that it does not carry; exports get fresh ones."""
    added: int
    """Tensors whose rows after the vocabulary were compared with what an export would have there."""
    weights: dict[str, str]
    """SHA-256 of each component of the checkpoint."""

    def __str__(self) -> str:
        how = f", {self.rounded} of them after rounding" if self.rounded else ", bit for bit"
        lines = [
            f"{self.tensors} tensors equal, made of {self.names} of theirs{how}; {self.unused} unused ones of the tower carried and equal"
        ]
        if self.added:
            lines.append(f"  rows after the vocabulary: those that an export has, in {self.added} tensors")
        if self.not_carried:
            lines.append(
                f"  unused ones of the tower that the checkpoint does not carry, so that exports get fresh ones: {', '.join(self.not_carried)}"
            )
        return "\n".join([*lines, *(f"  {component}: sha256 {digest}" for component, digest in self.weights.items())])


def verify_conversion(request: HfSource, checkpoint: Path) -> VerifyReport:
    """Compare every tensor. Raises ConversionError with the first differences and their likely cause, CheckpointError for a damaged checkpoint."""
    source, opened = open_hf_model(request), open_checkpoint(checkpoint)
    verify_files(opened.path, contents=True)
    if not source.has_projector:
        raise ConversionError(
            f"{request.directory}: missing tensor: has no projector, so there is nothing to compare the checkpoint's with"
        )
    _check_models(source, opened)
    _check_names(source, opened)
    theirs = megatron_tensors(source, seed=0)
    different, digests, rounded = [], {}, 0
    for mapping in source.mappings:
        expected, found = theirs[mapping.name].read(), opened.weights[mapping.name].read()
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
    carried = {name: tensor for name, tensor in source.unused().items() if f"vision.{name}" in opened.unused}
    others = [f"{name} (not computed, carried for exports) differs" for name in _different_unused(carried, opened)]
    others += _different_added_rows(source, opened)
    if different or others:
        raise ConversionError(_report(request, opened, different, others, theirs))
    return VerifyReport(
        tensors=len(source.mappings),
        names=sum(len(mapping.hf_names) for mapping in source.mappings),
        rounded=rounded,
        unused=len(carried),
        not_carried=tuple(name for name in source.unused() if name not in carried),
        added=len(source.added_rows),
        weights=combine_component_hashes(digests),
    )


def _same_rounded(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one of them is the other, rounded to its own dtype. Neither of fp16 and bf16 is the coarser one for all values: both ways are tried."""
    return _same_bits(one.to(other.dtype), other) or _same_bits(other.to(one.dtype), one)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As integers, so that NaN equals itself and 0 is not -0.
    whole = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def _difference(mapping: WeightMapping, theirs: torch.Tensor, ours: torch.Tensor) -> TensorDifference:
    """Chunk by chunk: a large tensor's differences in fp32 would take several times its memory."""
    first, count, largest, is_small = 0, 0, 0.0, True
    pairs = zip(theirs.reshape(-1).split(CHUNK), ours.reshape(-1).split(CHUNK))
    for number, (one, other) in enumerate(pairs):
        different = (one != other) | (one.signbit() != other.signbit())
        here = int(different.sum())
        if here and not count:
            first = number * CHUNK + int(different.view(torch.uint8).argmax())  # of equal values, the first one
        count += here
        gap = (one.float() - other.float()).abs()
        largest = max(largest, float(gap.max()))
        is_small &= bool((gap <= BF16_STEP * torch.maximum(one.abs(), other.abs()).float()).all())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), theirs.shape))
    return TensorDifference(mapping, where, (float(theirs[where]), float(ours[where])), count, largest, is_small)


def _different_unused(carried: dict[str, LazyTensor], opened: OpenCheckpoint) -> Iterator[str]:
    for name, tensor in carried.items():
        own = opened.unused[f"vision.{name}"]
        if own.shape != tensor.shape or not _same_rounded(own.read(), tensor.read()):
            yield name


def _different_added_rows(source: HfModel, opened: OpenCheckpoint) -> Iterator[str]:
    """Where the rows after the vocabulary are not what an export of the checkpoint has there."""
    for part, theirs in source.added_rows.items():
        carried = opened.unused.get(ADDED_ROWS[part]) if opened.manifest.state.step == 0 else None
        values = opened.weights[f"language.{part}.weight"].read()[: source.config.language.vocab_size]
        if not _same_rounded(theirs.read(), added_vocab_rows(values, theirs.shape[0], carried=carried)):
            kind = (
                "the mean of the others"
                if carried is None or carried.shape[0] != theirs.shape[0]
                else "the ones that were imported"
            )
            yield f"{part}: its {theirs.shape[0]} rows after the vocabulary are not {kind}, which an export would have there"


def _check_models(source: HfModel, opened: OpenCheckpoint) -> None:
    found = model_differences(source.config, opened.config.model)
    if found:
        listed = "; ".join(f"{key} {theirs!r} there, {ours!r} in the checkpoint" for key, theirs, ours in found)
        raise ConversionError(f"{opened.path}: is of another model: {listed}")


def _check_names(source: HfModel, opened: OpenCheckpoint) -> None:
    """Each tensor of ours is there once, with its shape, and no other."""
    try:
        table = check_megatron_weights(opened.weights, source.config, naming=source.naming)
    except ConversionError as error:
        raise ConversionError(f"{opened.path}: {error}") from error
    extra = sorted(opened.weights.keys() - {mapping.name for mapping in table})
    if extra:
        raise ConversionError(
            f"{opened.path}: unexpected: {', '.join(extra[:SHOWN])}: no tensor of the model that its configuration describes"
        )


def _report(
    request: HfSource,
    opened: OpenCheckpoint,
    different: list[TensorDifference],
    others: list[str],
    theirs: dict[str, LazyTensor],
) -> str:
    lines = [f"{opened.path} and {request.directory} differ in {len(different) + len(others)} tensors:"]
    lines += [f"  {difference}" for difference in different[:SHOWN]]
    if len(different) > SHOWN:
        lines.append(f"  and {len(different) - SHOWN} more")
    lines += [f"  {line}" for line in others[:SHOWN]]
    if different:
        lines.append(f"likely cause: {_cause(different, theirs, opened)}")
    return "\n".join(lines)


def _cause(different: list[TensorDifference], theirs: dict[str, LazyTensor], opened: OpenCheckpoint) -> str:
    names = [difference.mapping.name for difference in different]
    if "vision.class_embedding" in names and not opened.weights["vision.class_embedding"].read().any():
        return "a missing class token: vision.class_embedding is all zeros in the checkpoint"
    if set(names) <= {"language.embedding.weight", "language.head.weight"}:
        return "vocabulary padding: only embedding and head differ, so rows were cut, added or overwritten"
    components = {name.partition(".")[0] for name in names}
    first = different[0]
    expected, found = theirs[first.mapping.name].read(), opened.weights[first.mapping.name].read()
    for cause, change in _changes(first.mapping):
        if _same_rounded(change(expected), found):
            return cause
    if all(difference.is_small for difference in different):
        return "rounding: one side went through a coarser dtype"
    if components == {"vision"}:
        total = sum(name.startswith("vision.") for name in theirs)
        return f"the wrong tower: {len(names)} of its {total} tensors differ and nothing else does"
    if components == {"projector"}:
        return "another projector: nothing else differs"
    return "other weights: one side was trained further, or comes from another model"


def _changes(mapping: WeightMapping) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Mistakes that converters make, as functions of the right tensor."""
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

        cause = "rope permutation: queries and keys are in the other order of rotary pairs (Meta's interleaved against Hugging Face's halves)"
        yield cause, permuted
        yield cause, returned
        yield (
            "query, key and value stand one after the other instead of by head",
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

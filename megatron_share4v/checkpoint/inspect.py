"""Describe a checkpoint as text: step, tensors with shapes and dtypes, hashes, configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_share4v.checkpoint.hf.exporter import OpenCheckpoint, open_checkpoint
from megatron_share4v.checkpoint.lazy_tensor import FLOAT_NAMES, LazyTensor, hash_components
from megatron_share4v.mcore.dist_checkpoint import STATE_PREFIX
from megatron_share4v.mcore.dist_checkpoint_files import stored_tensors
from megatron_share4v.text.load_tokenizer import find_tokenizer

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def describe_checkpoint(path: Path, *, hashes: bool, every_layer: bool) -> Iterator[str]:
    """Yield lines for the console.

    `hashes` reads the weights of components whose hash the manifest does not have. Layers with equal shapes share one
    line unless `every_layer`. Raises CheckpointError.
    """
    opened = open_checkpoint(path)
    manifest = opened.manifest
    state = manifest.state
    yield f"{opened.path}: {manifest.size / 1e9:.3f} GB in {len(manifest.files)} files"
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    yield f"source: {manifest.source or 'a training run'}; written at {manifest.layout} by {versions}"
    yield f"step {state.step}, {state.consumed_samples} samples consumed, plan {state.plan_fingerprint or 'none'}"
    optimizer = sum(name.startswith(STATE_PREFIX) for name in stored_tensors(opened.path))
    yield f"optimizer: {f'{optimizer} tensors, {manifest.updates} updates' if optimizer else 'none (weights only)'}"
    if find_tokenizer(opened.path):
        yield from _tokenizer(opened)
    yield from _tree(opened, every_layer=every_layer)
    if opened.unused:
        yield f"stored for exports, not computed: {len(opened.unused)} tensors"
    missing = {
        name: tensor for name, tensor in opened.weights.items() if name.partition(".")[0] not in manifest.weights
    }
    weights = {**manifest.weights, **(hash_components(missing) if hashes else {})}
    yield from (f"{component}: sha256 {digest}" for component, digest in weights.items())
    if missing and not hashes:
        yield "hashes of the other components: not stored by a training run; --hashes reads the weights for them"
    yield "configuration:"
    yield from (f"  {line}" for line in manifest.config.splitlines())


def _tokenizer(opened: OpenCheckpoint) -> Iterator[str]:
    tokenizer = opened.tokenizer
    added = ", ".join(f"{token.text} {token.id}" for token in tokenizer.added)
    kind = tokenizer.summary() if tokenizer.rule is None else f"rule {tokenizer.rule}"
    yield f"tokenizer: {tokenizer.pieces} pieces{f', added tokens {added}' if added else ''}; {kind}"


def _tree(opened: OpenCheckpoint, *, every_layer: bool) -> Iterator[str]:
    groups: dict[tuple[str, tuple[int, ...], torch.dtype], list[tuple[str, LazyTensor]]] = {}
    for name, tensor in opened.weights.items():
        key = name if every_layer else _NUMBER.sub("*", name)
        groups.setdefault((key, tensor.shape, tensor.dtype), []).append((name, tensor))
    total = sum(torch.Size(tensor.shape).numel() for tensor in opened.weights.values())
    yield f"weights: {len(opened.weights)} tensors, {total:,} parameters (padding of the vocabulary included)"
    for (name, shape, dtype), members in groups.items():
        times = f" x {len(members)}" if len(members) > 1 else ""
        yield f"  {name}{times}: {list(shape)} {FLOAT_NAMES.get(dtype, str(dtype))}"

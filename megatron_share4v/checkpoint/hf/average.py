"""Average the weights of checkpoints (Izmailov et al. 2018, arXiv 1803.05407), one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_share4v.checkpoint.assets import UNUSED, open_stored_tokenizer, tokenizer_path, write_tokenizer
from megatron_share4v.checkpoint.hf.exporter import OpenCheckpoint, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import log_component_hashes, write_weights_checkpoint
from megatron_share4v.checkpoint.hf.vocab import ADDED_ROWS
from megatron_share4v.checkpoint.hf.writer import write_safetensors
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, LazyTensors
from megatron_share4v.checkpoint.manifest import Manifest, verify_files
from megatron_share4v.checkpoint.resumable_writer import stage_directory
from megatron_share4v.errors import ConversionError


def average_checkpoints(checkpoints: Sequence[Path], target: Path) -> Manifest:
    """Write the checkpoint `target` with the mean of the weights; of one checkpoint, its weights without optimizer
    state.

    Sums are in fp32 in the given order, rounded once to the first checkpoint's dtype. `target` has the first one's
    configuration and the last one's step. Raises ConversionError naming the first tensor that the checkpoints do not
    share.
    """
    opened = [open_checkpoint(path) for path in checkpoints]
    for one in opened:
        verify_files(one.path, contents=True)
    first = opened[0]
    for other in opened[1:]:
        _check_same(first, other)
    means = {name: _mean([one.weights for one in opened], name) for name in first.weights}
    names = ", ".join(one.path.name for one in opened)
    files = [[str(one.path.resolve()), *(file.sha256 for file in one.manifest.files.values())] for one in opened]
    with stage_directory(target, fingerprint=hashlib.sha256(json.dumps(files).encode()).hexdigest()) as staging:
        manifest = write_weights_checkpoint(
            staging,
            means,
            config=first.config,
            state=opened[-1].manifest.state,
            source=f"mean of {names}" if len(opened) > 1 else f"weights of {names}",
            write_assets=lambda: _write_assets(opened, staging.path),
        )
    log_component_hashes(target, manifest)
    return manifest


def _check_same(first: OpenCheckpoint, other: OpenCheckpoint) -> None:
    for name in [*first.weights, *other.weights]:
        one, two = (opened.weights.get(name) for opened in (first, other))
        if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
            described = [f"{tensor.shape} {tensor.dtype}" if tensor else "missing" for tensor in (one, two)]
            raise ConversionError(
                f"{other.path}: cannot be averaged with {first.path}: {name} is {described[1]}, there {described[0]}"
            )


def _mean(checkpoints: Sequence[LazyTensors], name: str) -> LazyTensor:
    first = checkpoints[0][name]

    def read() -> torch.Tensor:
        total = first.read()
        if len(checkpoints) == 1:
            return total
        total = total.float()
        for tensors in checkpoints[1:]:
            total += tensors[name].read().float()
        return (total / len(checkpoints)).to(first.dtype)

    return LazyTensor(first.shape, first.dtype, first.origin, read)


def _write_assets(opened: Sequence[OpenCheckpoint], directory: Path) -> None:
    """Write the first checkpoint's tokenizer and the mean of the unused weights that all have.

    Added vocabulary rows are only valid for untrained imports, so they are left out when a checkpoint was trained.
    """
    path = tokenizer_path(opened[0].path, opened[0].config.data)
    if path.is_file():
        write_tokenizer(directory, open_stored_tokenizer(path))
    unused = [one.unused for one in opened]
    shared = [
        name
        for name, tensor in unused[0].items()
        if all(name in other and other[name].shape == tensor.shape for other in unused)
    ]
    if any(one.manifest.state.step for one in opened):
        shared = [name for name in shared if name not in ADDED_ROWS.values()]
    if shared:
        write_safetensors(directory / UNUSED, {name: _mean(unused, name) for name in shared})

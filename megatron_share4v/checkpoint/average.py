"""The mean of several checkpoints' weights (Izmailov et al. 2018, arXiv 1803.05407), one tensor at a time; of one checkpoint, its weights alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_share4v.checkpoint.companions import TOKENIZER, companions_of
from megatron_share4v.checkpoint.exporter import Opened, open_checkpoint
from megatron_share4v.checkpoint.importer import report_weights, write_checkpoint
from megatron_share4v.checkpoint.lazy import LazyTensor
from megatron_share4v.checkpoint.manifest import Manifest, verify
from megatron_share4v.checkpoint.parts import writing
from megatron_share4v.errors import ConversionError


def average(checkpoints: Sequence[Path], target: Path) -> Manifest:
    """Write the checkpoint `target` (weights alone): sums in fp32, in the order given, rounded once to the first one's dtype.

    It has the first one's configuration and the last one's step. Raises ConversionError naming the first tensor that they do not share.
    """
    opened = [open_checkpoint(path) for path in checkpoints]
    for one in opened:
        verify(one.path, contents=True)
    first = opened[0]
    for other in opened[1:]:
        _check_same(first, other)
    ours = {name: LazyTensor(tensor.shape, tensor.dtype, tensor.origin, _mean(opened, name)) for name, tensor in first.weights.items()}
    names = ", ".join(one.path.name for one in opened)
    files = [[str(one.path.resolve()), *(file.sha256 for file in one.manifest.files.values())] for one in opened]
    with writing(target, fingerprint=hashlib.sha256(json.dumps(files).encode()).hexdigest()) as place:
        manifest = write_checkpoint(
            place,
            ours,
            config=first.config,
            state=opened[-1].manifest.state,
            source=f"mean of {names}" if len(opened) > 1 else f"weights of {names}",
            companions=lambda: _copy_companions(first, place.directory),
        )
    report_weights(target, manifest)
    return manifest


def _check_same(first: Opened, other: Opened) -> None:
    for name in [*first.weights, *other.weights]:
        one, two = (opened.weights.get(name) for opened in (first, other))
        if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
            described = [f"{tensor.shape} {tensor.dtype}" if tensor else "not there" for tensor in (one, two)]
            raise ConversionError(f"{other.path}: cannot be averaged with {first.path}: {name} is {described[1]}, there {described[0]}")


def _mean(opened: Sequence[Opened], name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        total = opened[0].weights[name].read()
        if len(opened) == 1:
            return total
        dtype, total = total.dtype, total.float()
        for one in opened[1:]:
            total += one.weights[name].read().float()
        return (total / len(opened)).to(dtype)

    return read


def _copy_companions(opened: Opened, directory: Path) -> None:
    for path in companions_of(opened.path):
        shutil.copyfile(path, directory / path.name)
    if not (directory / TOKENIZER).is_file() and opened.tokenizer.is_file():
        shutil.copyfile(opened.tokenizer, directory / TOKENIZER)

"""FLOPs of one step from its plan: real tokens and images for the model, padding and blank images for the hardware."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.sampling.sampler import GlobalBatch
from megatron_share4v.model.flops import ExecutionOptions, WorkloadCounts, hardware_flops, model_flops
from megatron_share4v.model.pipeline_split import layers_per_stage


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step on all ranks together."""

    model: float
    """FLOPs of the model itself, without padding and recomputation."""
    hardware: float
    """FLOPs that were computed."""


def step_flops(
    config: RunConfig,
    items: GlobalBatch,
    *,
    trained_tokens: int,
    images_per_sample: np.ndarray,
    fused_head: bool = True,
) -> StepFlops:
    """Compute the FLOPs of a step over `items`; `images_per_sample` [n] belongs to items.rows.

    `fused_head` false: for a step of another trainer, whose backward pass does not compute the logits again.

    Blank images: with overlapped gradient reduction a micro-batch without images runs one blank image through the
    tower. Not counted is what context parallelism adds: an image across a CP border runs through the tower of two
    ranks, and with overlap a rank without images runs a blank one.
    """
    real = WorkloadCounts(
        positions=items.tokens, squares=_squares(items.lengths), images=items.images, head_rows=trained_tokens
    )
    trainable = config.model.trainable
    blank = 0
    if config.parallel.overlap_grad_reduce and (trainable.projector or trainable.vision_from_block is not None):
        blank = sum(
            not images.any() for images in np.split(images_per_sample, _bounds(items, config.train.micro_batch_size))
        )
    length = items.sequence_length
    if items.counts is None:
        squares = items.sequences * float(length) ** 2 if items.padded is None else _squares(items.padded)
    else:  # the padding at the end of a pack is a segment of its own
        filled = np.add.reduceat(items.lengths, np.cumsum([0, *items.counts[:-1]]))
        squares = _squares(items.lengths) + _squares(length - filled)
    done = WorkloadCounts(
        positions=items.positions, squares=squares, images=items.images + blank, head_rows=trained_tokens
    )
    execution = ExecutionOptions.of(
        config, fused_head=fused_head, layers_per_stage=layers_per_stage(config.model, config.parallel)
    )
    return StepFlops(model_flops(config.model, real), hardware_flops(config.model, done, execution))


def _bounds(items: GlobalBatch, micro_batch_size: int) -> np.ndarray:
    """Return where each micro-batch but the first begins in items.rows."""
    ends = np.arange(1, len(items.rows) + 1) if items.counts is None else np.cumsum(items.counts)
    return ends[micro_batch_size - 1 : -1 : micro_batch_size]


def _squares(lengths: np.ndarray) -> float:
    return float(np.square(lengths, dtype=np.float64).sum())

"""Workload of a run whose data set is prepared on this machine, from the sample order of the run."""

from __future__ import annotations

import numpy as np

from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.sampling.blend import open_index
from megatron_share4v.data.sampling.sampler import Sampler
from megatron_share4v.planner.workload import Workload

SAMPLED_STEPS = 40


def measured_workload(config: RunConfig) -> Workload:
    """Average evenly spaced steps of the sampling sampler. Raises DataError for a data set that cannot be read."""
    data, train = config.data, config.train
    sampler = Sampler.from_config(config, open_index(data.train))
    total = train.total_steps(sampler.epoch_items)
    steps = [
        sampler.global_batch(int(step))
        for step in np.unique(np.linspace(0, total - 1, min(total, SAMPLED_STEPS)).astype(int))
    ]
    sequences = sum(items.sequences for items in steps)
    lengths = np.concatenate([items.lengths for items in steps]).astype(float)
    squares = float((lengths**2).sum()) / sequences
    length = sum(items.positions for items in steps) / sequences
    return Workload(
        length=round(length),
        longest=max(items.sequence_length for items in steps) if data.pack_length else _longest(sampler),
        positions=float(lengths.sum()) / sequences,
        squares=squares,
        padded_squares=squares if data.pack_length else length**2,
        images=sum(items.images for items in steps) / sequences,
        head_rows=sum(items.trained_tokens for items in steps) / sequences,
        sequences=sampler.epoch_items,
        source=f"measured: {len(steps)} of {total} steps of {data.train}",
    )


def _longest(sampler: Sampler) -> int:
    """Positions of the longest sample, padded as in a step."""
    rows = sampler.index.rows
    positions = int((rows["n_tok"].astype(int) + rows["n_img"].astype(int) * (sampler.tokens_per_image - 1)).max())
    return -(-positions // sampler.pad_multiple) * sampler.pad_multiple

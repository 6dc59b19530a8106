"""From a RunConfig and a Mesh to everything that a run works with, in reading order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_share4v.checkpoint.store import RunState, find_newest_whole, load, load_weights
from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.encode import Encoder
from megatron_share4v.data.image import ImagePolicy
from megatron_share4v.data.index import Index
from megatron_share4v.data.plan import Plan
from megatron_share4v.errors import CheckpointError
from megatron_share4v.log import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import MegatronOptimizer, build_optimizer, wrap_chunks
from megatron_share4v.mcore.transformer import DTYPES
from megatron_share4v.model.chunks import build_chunks, layers_per_stage
from megatron_share4v.model.initialize import initialize
from megatron_share4v.model.stages import describe_stages
from megatron_share4v.model.trainable import parameter_counts, table
from megatron_share4v.text.template import get_template
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.train.feed import Source

@dataclass(frozen=True, kw_only=True)
class Training:
    """One run, ready to step."""

    config: RunConfig
    mesh: Mesh
    source: Source
    validation: Source | None
    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    total_steps: int
    start_step: int
    """Updates already made when this process started."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.directory)

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.directory / "checkpoints"


def build(config: RunConfig, *, mesh: Mesh) -> Training:
    """Data, model, optimizer, and the state of the newest whole checkpoint where there is one.

    Raises ConfigError, DataError or CheckpointError, on every rank alike, when something does not fit.
    """
    mesh.layout.check_micro_batches(global_batch_size=config.train.global_batch_size, micro_batch_size=config.train.micro_batch_size)
    source = open_source(config, config.data.train, order=config.data.order)
    validation = open_source(config, config.data.validation, order="sequential") if config.data.validation else None
    dtype = DTYPES[config.precision.dtype]
    bare = build_chunks(config.model, mesh=mesh, parallel=config.parallel, dtype=dtype)
    _announce(config, mesh, bare)
    checkpoints = Path(config.run.directory) / "checkpoints"
    newest = find_newest_whole(checkpoints, mesh=mesh)
    if newest is None:
        _set_first_weights(config, bare, mesh=mesh)
    chunks = wrap_chunks(bare, mesh=mesh, parallel=config.parallel)
    optimizer = build_optimizer(chunks, config.optim, parallel=config.parallel, dtype=dtype)
    start_step = 0
    if newest is not None:
        state = load(newest, chunks=chunks, optimizer=optimizer, mesh=mesh, verified=True)
        _check_position(state, source.plan, newest)
        start_step = state.step
        get_logger().info("resumed from %s at step %d, %d samples consumed", newest, state.step, state.consumed_samples)
    return Training(
        config=config,
        mesh=mesh,
        source=source,
        validation=validation,
        chunks=chunks,
        optimizer=optimizer,
        total_steps=config.train.total_steps(len(source.index)),
        start_step=start_step,
    )


def open_source(config: RunConfig, directory: str, *, order: str) -> Source:
    """A prepared data set that belongs to this run's tokenizer and template; DataError otherwise."""
    data = config.data
    tokenizer = Tokenizer(data.tokenizer)
    index = Index.open(directory)
    index.check(tokenizer=tokenizer, template=get_template(data.template).name, max_text_length=data.max_text_length)
    plan = Plan(
        index,
        order=order,
        group_size=data.group_size,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        tokens_per_image=config.model.vision.num_patches,
        # Sequence parallelism cuts each sequence into `tensor` equal parts.
        pad_multiple=math.lcm(data.pad_multiple, config.parallel.tensor if config.parallel.sequence else 1),
    )
    encoder = make_encoder(config.model.vision.image_size, data, tokenizer)
    return Source(index=index, plan=plan, encoder=encoder, num_workers=data.num_workers, prefetch=data.prefetch)


def make_encoder(image_size: int, data: DataConfig, tokenizer: Tokenizer) -> Encoder:
    """How this run turns samples into ids and pixels."""
    return Encoder(
        tokenizer=tokenizer,
        template=get_template(data.template),
        max_text_length=data.max_text_length,
        images=ImagePolicy(image_size=image_size, aspect_ratio=data.image_aspect_ratio),
    )


def _set_first_weights(config: RunConfig, chunks: list, *, mesh: Mesh) -> None:
    start = config.checkpoint.initialize_from
    if start is None:
        initialize(chunks, seed=config.run.seed, model=config.model)
        get_logger().info("weights: freshly initialised, seed %d", config.run.seed)
        return
    load_weights(Path(start), chunks=chunks, mesh=mesh)
    get_logger().info("weights: from %s", start)


def _check_position(state: RunState, plan: Plan, path: Path) -> None:
    if state.plan_fingerprint != plan.fingerprint:
        raise CheckpointError(
            f"{path}: was trained on another sequence of samples (plan {state.plan_fingerprint[:12]}, now {plan.fingerprint[:12]}): the data set, "
            "its order or the seed has changed. Use another run.directory, with checkpoint.initialize_from to keep the weights"
        )
    if state.consumed_samples != state.step * plan.global_batch_size:
        raise CheckpointError(
            f"{path}: {state.consumed_samples} samples were consumed in {state.step} steps; train.global_batch_size {plan.global_batch_size} does not "
            "continue that. Restore the old value, or use another run.directory with checkpoint.initialize_from"
        )


def _announce(config: RunConfig, mesh: Mesh, chunks: list) -> None:
    """Every choice that was made, once."""
    logger = get_logger()
    logger.info("layout: %s on %s", mesh.layout, mesh.device.describe())
    logger.info("precision: %s; attention: torch scaled_dot_product_attention; optimizer: AdamW (torch)", config.precision.dtype)
    logger.info(describe_stages(layers_per_stage(config.model, config.parallel), pipeline=config.parallel.pipeline))
    for line in table(parameter_counts(chunks, mesh=mesh)):
        logger.info(line)

"""Builds everything that a run works with from a RunConfig and a Mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.checkpoint.assets import copy_assets_to_run, open_stored_tokenizer
from megatron_share4v.checkpoint.compatibility import check_initial_model
from megatron_share4v.checkpoint.config_diff import check_config_changes, diff_config, format_changes
from megatron_share4v.checkpoint.manifest import Manifest
from megatron_share4v.checkpoint.store import (
    RunState,
    find_resume_checkpoint,
    load_checkpoint,
    load_weights,
    resolve_and_read_manifest,
)
from megatron_share4v.config.data import BlendSource, DataConfig
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.loading.loader import LoaderOptions
from megatron_share4v.data.sampling.blend import open_index, source_rows
from megatron_share4v.data.sampling.fingerprint import describe_data, fingerprint_differences
from megatron_share4v.data.sampling.sampler import Order, Sampler
from megatron_share4v.errors import CheckpointError, DataError
from megatron_share4v.files import append_json_lines
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.backends import check_precision, select_attention_backend, select_ops_backend
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_config import DTYPES
from megatron_share4v.mcore.layer_options import LayerOptions, layer_options
from megatron_share4v.mcore.optimizer import MegatronOptimizer, TimedDDP, build_optimizer, wrap_ddp
from megatron_share4v.mcore.tp_comm_overlap import initialize_tp_comm_overlap
from megatron_share4v.mcore.transformer_engine import te_unavailable_reason
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import initialize_weights
from megatron_share4v.model.pipeline_split import describe_stages, layers_per_stage
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.model.trainable import format_parameter_table, parameter_counts
from megatron_share4v.ops.backend import OpsBackend
from megatron_share4v.parallel.device import Device
from megatron_share4v.text.load_tokenizer import find_tokenizer, load_tokenizer, with_rule
from megatron_share4v.text.template import get_template
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import TokenizerRule
from megatron_share4v.train.backend_records import record_attention_backend, record_image_backend, record_ops_backend
from megatron_share4v.train.data_feed import Source

DATA_CHANGES = "data_changes.jsonl"
"""File in the run directory that records resumes with other data (checkpoint.allow_data_change)."""

CONFIG_CHANGES = "config_changes.jsonl"
"""File in the run directory that records resumes with another configuration than the checkpoint's."""
SAMPLE_TEXT = "The image shows a cat that is sleeping on a red sofa, and 12 people in the background.\n"
"""Text by whose ids the vocabularies of two tokenizers are compared."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A built run, ready to train."""

    config: RunConfig
    mesh: Mesh
    source: Source
    validation: Source | None
    chunks: Sequence[TimedDDP]
    optimizer: MegatronOptimizer
    total_steps: int
    start_step: int
    """Steps already trained when this process started."""

    @property
    def last_step(self) -> int:
        """Step after which this process ends: the last one, or run.exit_at_step."""
        return min(self.total_steps, self.config.run.exit_at_step or self.total_steps)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.directory)

    @property
    def checkpoints(self) -> Path:
        """The directory of this run's checkpoints."""
        return self.directory / "checkpoints"


def build(config: RunConfig, *, mesh: Mesh) -> Training:
    """Build data, model and optimizer, and load the newest complete checkpoint where there is one. Collective.

    Raises ConfigError, DataError, CheckpointError or OpsError, on every rank alike, when something does not fit.
    """
    directory = Path(config.run.directory)
    mesh.layout.check_micro_batches(
        global_batch_size=config.train.global_batch_size, micro_batch_size=config.train.micro_batch_size
    )
    source, validation = _open_sources(config, device=mesh.device)
    # Compared before the model is built: the memory may not hold a wrong one.
    newest = find_resume_checkpoint(directory / "checkpoints")
    initial_weights = None
    if newest is None:
        initial_weights = _check_initial_weights(config, tokenizer=source.encoder.tokenizer)
    else:
        _check_config_changes(config, newest, mesh=mesh)
    model_chunks = _build_model(config, mesh=mesh)
    if newest is None:
        _set_initial_weights(config, model_chunks, start=initial_weights)
    if mesh.rank == 0:
        start = None if initial_weights is None else initial_weights[0]
        copy_assets_to_run(directory, tokenizer=source.encoder.tokenizer, start=start, resumes=newest is not None)
    chunks = wrap_ddp(model_chunks, mesh=mesh, parallel=config.parallel, gradients=config.precision.gradients)
    dtype = DTYPES[config.precision.dtype]
    optimizer = build_optimizer(chunks, config.optim, parallel=config.parallel, dtype=dtype, seed=config.run.seed)
    start_step = 0
    if newest is not None:
        state = load_checkpoint(newest, chunks=chunks, optimizer=optimizer, verified=True)
        _check_data_position(config, state, source, newest, mesh=mesh)
        start_step = state.step
        get_logger().info("resumed from %s at step %d, %d samples consumed", newest, state.step, state.consumed_samples)
    record_image_backend(source, model_chunks[0], mesh=mesh, directory=directory)
    return Training(
        config=config,
        mesh=mesh,
        source=source,
        validation=validation,
        chunks=chunks,
        optimizer=optimizer,
        total_steps=config.train.total_steps(source.sampler.epoch_items),
        start_step=start_step,
    )


def _open_sources(config: RunConfig, *, device: Device) -> tuple[Source, Source | None]:
    """Open the training data and, where there is one, the validation data."""
    data, options = config.data, read_options(config.data, device=device)
    source = open_source(config, data.train, order=data.order, options=options)
    if not data.validation:
        return source, None
    rule = source.encoder.tokenizer.rule
    return source, open_source(config, data.validation, order="sequential", options=options, rule=rule)


def _build_model(config: RunConfig, *, mesh: Mesh) -> list[Share4V]:
    """Select the backends, record them in the run directory, and build this rank's model chunks. Collective."""
    directory, dtype = Path(config.run.directory), DTYPES[config.precision.dtype]
    ops = select_ops_backend(config.ops, mesh=mesh)
    record_ops_backend(ops, mesh=mesh, directory=directory)
    packed = config.data.pack_length is not None
    attention = select_attention_backend(config.attention, mesh=mesh, packed=packed, dtype=dtype)
    record_attention_backend(attention, mesh=mesh, directory=directory)
    check_precision(config, mesh=mesh)
    options = layer_options(
        config.train,
        precision=config.precision,
        transformer_engine=config.transformer_engine,
        attention=attention.implementation,
        variable_seq_lengths=config.data.pad_to == "micro_batch",
        has_transformer_engine=te_unavailable_reason() is None,
    )
    initialize_tp_comm_overlap(config, mesh=mesh)
    chunks = build_chunks(
        config.model, mesh=mesh, parallel=config.parallel, dtype=dtype, ops=ops.implementation, options=options
    )
    _log_choices(config, mesh, chunks, ops=ops, options=options)
    return chunks


def read_options(data: DataConfig, *, device: Device) -> LoaderOptions:
    """Derive this rank's read options; DALI decodes on the GPU where there is one."""
    return LoaderOptions(
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        worker_timeout_s=data.worker_timeout_s,
        image_backend=data.image_backend,
        device_index=device.index if device.kind == "cuda" and data.image_backend == "dali" else None,
    )


def open_source(
    config: RunConfig,
    data_sets: str | Sequence[BlendSource],
    *,
    order: Order,
    options: LoaderOptions,
    rule: TokenizerRule | None = None,
) -> Source:
    """Open prepared data sets. Raises DataError when they do not fit the tokenizer and template of the run.

    rule: how text after a special token is tokenised; None: as the data sets were prepared.
    """
    data = config.data
    index = open_index(data_sets)
    tokenizer = _open_tokenizer(data, rule or index.tokenizer_rule)
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise DataError(
            f"{data.tokenizer}: has {tokenizer.vocab_size} tokens ({tokenizer.pieces} pieces and "
            f"{len(tokenizer.added)} added tokens), more than model.language.vocab_size "
            f"{config.model.language.vocab_size}; name the model's own tokenizer, or give the model as many"
        )
    template = get_template(data.template, data.trained_markers)
    index.check(tokenizer=tokenizer, template=template, max_text_length=data.max_text_length)
    sampler = Sampler.from_config(config, index, order=order)
    for share in source_rows(index):
        get_logger().info("data: %s, %d samples, %.3g times per epoch", share.name, share.count, share.epochs)
    if sampler.packing:
        get_logger().info(
            "data: an epoch is %d packs of %d positions, %.1f %% filled",
            sampler.epoch_items,
            sampler.packing.length,
            100 * sampler.fill,
        )
    encoder = make_encoder(config.model.vision, data, tokenizer)
    return Source(index=index, sampler=sampler, encoder=encoder, options=options)


def _open_tokenizer(data: DataConfig, rule: TokenizerRule | None) -> Tokenizer:
    """Open the run's tokenizer with the rule of its data sets; warn when the tokenizer's files state another."""
    tokenizer = load_tokenizer(data.tokenizer)
    if rule is None or tokenizer.rule is None:  # a tokenizer.json; Index.check compares it with the data set's
        return tokenizer
    if tokenizer.states_rule and tokenizer.rule != rule:
        get_logger().warning(
            "data: the data set was prepared with tokenizer rule %s, which this run uses; the tokenizer's is %s. "
            "Only text after </s> and other special tokens differs. To train with the tokenizer's rule, run "
            "tools/prepare_data.py again",
            rule,
            tokenizer.summary(),
        )
    return with_rule(tokenizer, rule, origin="the data set")


def make_encoder(vision: VisionConfig, data: DataConfig, tokenizer: Tokenizer) -> Encoder:
    """Build the encoder that turns samples into token ids and pixels."""
    return Encoder(
        tokenizer=tokenizer,
        template=get_template(data.template, data.trained_markers),
        max_text_length=data.max_text_length,
        images=ImagePolicy.from_config(vision, data),
    )


def check_start_tokenizer(start: Path, tokenizer: Tokenizer) -> None:
    """Raise DataError when the checkpoint that a run starts from has other ids for a text; warn about another rule.

    A tokenizer with more added tokens, and the other file of a model that has both, give the same ids.
    """
    path = find_tokenizer(start)
    if path is None:
        return
    stored = open_stored_tokenizer(path)
    if stored.encode(SAMPLE_TEXT) != tokenizer.encode(SAMPLE_TEXT):
        raise DataError(
            f"checkpoint.initialize_from: {start} was trained with another tokenizer ({path}) than this run's "
            f"data.tokenizer {tokenizer.path}: they have different ids for the same text; prepare the data with the "
            "checkpoint's tokenizer, or start from a checkpoint of the other language model"
        )
    found = stored.rule
    if found != tokenizer.rule and None not in (found, tokenizer.rule):
        get_logger().warning(
            "checkpoint.initialize_from: %s has tokenizer rule %s, the data set of this run %s, which is used. Only "
            "text after </s> and other special tokens differs; to keep the checkpoint's rule, prepare the data with "
            "--tokenizer-rule %s",
            start,
            found,
            tokenizer.rule,
            found,
        )


def _check_initial_weights(config: RunConfig, *, tokenizer: Tokenizer) -> tuple[Path, Manifest] | None:
    """Return the checkpoint of checkpoint.initialize_from; None without it.

    Raises CheckpointError or DataError when it is of another model or tokenizer.
    """
    if config.checkpoint.initialize_from is None:
        return None
    where, manifest = resolve_and_read_manifest(Path(config.checkpoint.initialize_from))
    check_initial_model(manifest, config.model, where=where, expect_tower=config.checkpoint.expect_tower)
    check_start_tokenizer(where, tokenizer)
    return where, manifest


def _set_initial_weights(config: RunConfig, chunks: list[Share4V], *, start: tuple[Path, Manifest] | None) -> None:
    """Load the weights of the checkpoint `start`, or initialise them by the seed."""
    if start is None:
        initialize_weights(chunks, seed=config.run.seed, model=config.model)
        get_logger().info("weights: freshly initialised, seed %d", config.run.seed)
        return
    where, manifest = start
    load_weights(where, chunks=chunks)
    tower = manifest.weights.get("vision", "not stated")
    get_logger().info("weights: from %s, tower sha256 %s", config.checkpoint.initialize_from, tower)


def _check_config_changes(config: RunConfig, path: Path, *, mesh: Mesh) -> None:
    """Log and record how the configuration differs from the checkpoint's; raise ConfigError for unsafe changes."""
    _, manifest = resolve_and_read_manifest(path)
    found = diff_config(manifest.config, config)
    check_config_changes(found, where=path, accepted=config.checkpoint.accept_changes)
    if not found:
        return
    get_logger().info("configuration: differs from that of %s:%s", path, format_changes(found))
    if mesh.rank == 0:
        changes = [str(change) for change in found]
        _append_json_line(
            Path(config.run.directory) / CONFIG_CHANGES,
            {"step": manifest.state.step, "checkpoint": path.name, "changes": changes},
        )


def _check_data_position(config: RunConfig, state: RunState, source: Source, path: Path, *, mesh: Mesh) -> None:
    """Raise CheckpointError when the run would continue on other data or elsewhere in the same data."""
    sampler = source.sampler
    changed = fingerprint_differences(state.data, describe_data(sampler, source.encoder)) if state.data else []
    if not changed and state.plan_fingerprint != sampler.fingerprint:
        changed = [f"plan: was {state.plan_fingerprint[:12]}, is {sampler.fingerprint[:12]}"]
    if changed and config.checkpoint.allow_data_change:
        _record_data_change(state, changed, path, directory=Path(config.run.directory) if mesh.rank == 0 else None)
        return
    if changed:
        raise CheckpointError(
            f"{path}: was trained on other data. {'; '.join(changed)}. Restore that, or use another run.directory with "
            "checkpoint.initialize_from to keep the weights, or set checkpoint.allow_data_change true to go on at the "
            "same step of the new data"
        )
    if state.consumed_samples != sum(sampler.consumed(state.step).values()):
        raise CheckpointError(
            f"{path}: {state.consumed_samples} samples were consumed in {state.step} steps; train.global_batch_size "
            f"{sampler.global_batch_size} does not continue that. Restore the old value, or use another run.directory "
            "with checkpoint.initialize_from"
        )


def _record_data_change(state: RunState, changed: Sequence[str], path: Path, *, directory: Path | None) -> None:
    get_logger().warning(
        "checkpoint.allow_data_change: %s was trained on other data, and training goes on. %s. Samples consumed are "
        "counted as if the new data had been trained from the start",
        path,
        "; ".join(changed),
    )
    if directory is not None:
        _append_json_line(
            directory / DATA_CHANGES, {"step": state.step, "checkpoint": path.name, "changes": list(changed)}
        )


def _append_json_line(path: Path, record: dict[str, object]) -> None:
    with open(path, "ab") as file:
        append_json_lines(file, [record])


def _log_choices(
    config: RunConfig, mesh: Mesh, chunks: list[Share4V], *, ops: OpsBackend, options: LayerOptions
) -> None:
    """Log layout, precision, optimizer, recomputation, stages and parameter counts, once."""
    logger = get_logger()
    is_native = ops.implementation == "native" or config.optim.moments == "bf16" or config.optim.offload
    place = " on the host" if config.optim.offload else ""
    update = f"{'native' if is_native else 'torch, fused'}; moments in {config.optim.moments}{place}"
    logger.info("layout: %s on %s", mesh.layout, mesh.device.describe())
    logger.info(
        "precision: %s, gradients summed in %s; FP8: %s; optimizer: AdamW (%s)",
        config.precision.dtype,
        config.precision.gradients,
        options.fp8,
        update,
    )
    logger.info("recomputed in the backward pass: language model %s; tower %s", options.language, options.tower)
    logger.info(describe_stages(layers_per_stage(config.model, config.parallel), pipeline=config.parallel.pipeline))
    for line in format_parameter_table(parameter_counts(chunks, mesh=mesh)):
        logger.info(line)

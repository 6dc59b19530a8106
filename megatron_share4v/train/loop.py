"""The run as one story: join, build, step, write, save."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_share4v.checkpoint.companions import FOLDER, companions_of
from megatron_share4v.checkpoint.keep import remove_old
from megatron_share4v.checkpoint.store import RunState, save
from megatron_share4v.config.load import dump
from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.state import describe_data
from megatron_share4v.log import configure, get_logger
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, joined
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.plan.gpus import known_gpu
from megatron_share4v.train.build import Training, build
from megatron_share4v.train.faults import Quarantine, warn_of
from megatron_share4v.train.feed import StepData, feed
from megatron_share4v.train.flops import step_flops
from megatron_share4v.train.goodput import Ledger, draw_goodput
from megatron_share4v.train.optim import learning_rate_factor
from megatron_share4v.train.preview import preview
from megatron_share4v.train.profiling import Profiler
from megatron_share4v.train.step import StepResult, train_step, validation_loss
from megatron_share4v.train.writers import RunWriters, StepRecord


def run(config: RunConfig) -> None:
    """Train until the last step. A second call with the same run directory goes on from its newest whole checkpoint."""
    world = World.from_environment()
    layout = Layout.for_world(config.parallel, world_size=world.size)
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    directory = Path(config.run.directory)
    configure(rank=world.rank, directory=directory / "log")
    if world.rank == 0:
        (directory / "config.yaml").write_text(dump(config))
    timeout_s = config.parallel.timeout_s
    with joined(world, device, timeout_s=timeout_s), open_mesh(layout, device=device, timeout_s=timeout_s) as mesh:
        train(build(config, mesh=mesh))


def train(training: Training) -> None:
    """All remaining steps of a run that is built."""
    config, mesh = training.config, training.mesh
    if training.start_step >= training.total_steps:
        get_logger().info("nothing to do: step %d of %d is already made", training.start_step, training.total_steps)
        return
    ledger = Ledger(training.directory / "metrics.jsonl" if mesh.rank == 0 else None, device=mesh.device, start_step=training.start_step)
    ledger.watch(training.chunks)
    profiler = Profiler(config.log.profile, directory=training.directory, device=mesh.device, rank=mesh.rank)
    writers = _open_writers(training) if mesh.rank == 0 else None
    steps = feed(training.source, mesh=mesh, start_step=training.start_step, stop_step=training.total_steps)
    validation = _validation_steps(training)
    quarantine = Quarantine(
        training.directory, mesh=mesh, start_step=training.start_step, max_fraction=config.data.max_faulty_fraction
    )
    for data in steps:
        started = time.perf_counter()
        step = data.items.step + 1
        factor = learning_rate_factor(step - 1, schedule=config.schedule, total_steps=training.total_steps)
        with profiler.step(step):
            result = train_step(
                training.chunks,
                training.optimizer,
                data,
                mesh=mesh,
                micro_batch_size=config.train.micro_batch_size,
                normalize=config.loss.normalize,
                learning_rate_factor=factor,
                clip_grad_norm=config.optim.clip_grad_norm,
            )
        mesh.device.synchronize()
        seconds = time.perf_counter() - started + data.wait_s
        booked = ledger.line(step_s=seconds - data.wait_s, data_wait_s=data.wait_s)
        checked = _validate(training, validation) if _due(step, config.train.validate_every_steps, training) else None
        faulty = quarantine.settle(data, consumed=sum(training.source.plan.consumed(step).values()))
        if writers is not None:
            record = _record(training, data, result, seconds=seconds, factor=factor, validation_loss=checked, faulty=faulty, ledger=booked)
            writers.write(record, keys=[training.source.index.key(row) for row in data.items.rows])
        if _due(step, config.train.preview_every_steps, training):
            _show(training, writers, step=step)
        if step == training.total_steps or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
            with ledger.saving():
                _save(training, step=step)
            if mesh.rank == 0:
                draw_goodput(training.directory)
    profiler.close()
    quarantine.close()
    if writers is not None:
        writers.close()


def _due(step: int, every: int, training: Training) -> bool:
    return bool(every) and (step % every == 0 or step == training.total_steps)


def _open_writers(training: Training) -> RunWriters:
    log = training.config.log
    return RunWriters(
        training.directory,
        start_step=training.start_step,
        total_steps=training.total_steps,
        console_every=log.every_steps,
        sample_keys=log.sample_keys,
        tensorboard=log.tensorboard,
    )


def _validation_steps(training: Training) -> list[StepData]:
    """The same few batches each time, read once."""
    if training.validation is None:
        return []
    count = training.config.train.validation_batches
    steps = list(feed(training.validation, mesh=training.mesh, start_step=0, stop_step=count))
    warn_of(steps, where="validation")
    return steps


def _validate(training: Training, steps: list[StepData]) -> float | None:
    if not steps:
        return None
    return validation_loss(training.chunks, steps, mesh=training.mesh, micro_batch_size=training.config.train.micro_batch_size)


def _show(training: Training, writers: RunWriters | None, *, step: int) -> None:
    source = training.validation or training.source
    train = training.config.train
    shown = preview(source, training.chunks, mesh=training.mesh, samples=train.preview_samples, max_new_tokens=train.preview_tokens)
    if shown is not None and writers is not None:
        writers.preview(shown, step=step)


def _save(training: Training, *, step: int) -> None:
    config = training.config
    state = RunState(
        step=step,
        consumed_samples=sum(training.source.plan.consumed(step).values()),
        plan_fingerprint=training.source.plan.fingerprint,
        data=describe_data(training.source.plan, training.source.encoder),
    )
    save(
        training.checkpoints,
        step=step,
        chunks=training.chunks,
        optimizer=training.optimizer,
        mesh=training.mesh,
        state=state,
        config_text=dump(config),
        companions=companions_of(training.directory / FOLDER),
    )
    if training.mesh.rank == 0:
        remove_old(training.checkpoints, keep_last=config.checkpoint.keep_last, keep_every_steps=config.checkpoint.keep_every_steps)
    dist.barrier()


def _record(
    training: Training,
    data: StepData,
    result: StepResult,
    *,
    seconds: float,
    factor: float,
    validation_loss: float | None,
    faulty: int,
    ledger: dict[str, float],
) -> StepRecord:
    config, mesh, items = training.config, training.mesh, data.items
    flops = step_flops(
        config,
        items,
        trained_tokens=result.trained_tokens,
        images_per_sample=training.source.index.rows["n_img"][items.rows],
        fused_head=training.chunks[0].config.ops == "native",
    )
    consumed = training.source.plan.consumed(items.step + 1)
    world = mesh.layout.world_size
    achieved, computed = flops.model / seconds / world, flops.hardware / seconds / world
    gpu = known_gpu(torch.cuda.get_device_name()) if mesh.device.kind == "cuda" else None
    return StepRecord(
        step=items.step + 1,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=config.optim.learning_rate * factor,
        consumed_samples=sum(consumed.values()),
        consumed_by_source=consumed if len(consumed) > 1 else {},
        trained_tokens=result.trained_tokens,
        tokens=items.tokens,
        images=items.images,
        padding_fraction=1.0 - items.tokens / (items.sequence_length * items.sequences),
        step_time_s=seconds,
        data_wait_s=data.wait_s,
        tokens_per_s_per_gpu=items.tokens / seconds / world,
        model_tflops_per_s_per_gpu=achieved / 1e12,
        mfu=achieved / gpu.bf16 if gpu else None,
        hardware_tflops_per_s_per_gpu=computed / 1e12,
        hfu=computed / gpu.bf16 if gpu else None,
        peak_memory_bytes=mesh.device.peak_memory_bytes(),
        skipped=result.skipped,
        faulty_samples=faulty,
        validation_loss=validation_loss,
        ledger=ledger,
    )

"""The run as one story: join, build, step, write, save."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import torch

from megatron_share4v.config.load import dump
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import RunStopped, disk_errors_as_config_error
from megatron_share4v.logging import configure, get_logger
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.observability.goodput import Ledger, draw_goodput
from megatron_share4v.observability.profiler import Profiler
from megatron_share4v.observability.wandb_writer import WandbSink, check_wandb
from megatron_share4v.observability.writers import METRICS, RunWriters, StepRecord
from megatron_share4v.parallel.collectives import run_on_rank0
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, kill_on_launcher_exit, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.planner.gpus import known_gpu
from megatron_share4v.resilience.error_report import ErrorReport
from megatron_share4v.resilience.heartbeat import Heartbeat, PhaseTimeouts
from megatron_share4v.resilience.preflight.consistency import check_ranks_consistent
from megatron_share4v.resilience.replica_checksum import check_replicas
from megatron_share4v.resilience.run_lock import exclusive_run
from megatron_share4v.resilience.shutdown import Agreed, Ballot, Signals, announce
from megatron_share4v.resilience.skip_steps import share_skip_steps
from megatron_share4v.resilience.straggler import StragglerMonitor
from megatron_share4v.resilience.time_limit import TimeLimit
from megatron_share4v.train.bad_steps import BadSteps
from megatron_share4v.train.build import Training, build
from megatron_share4v.train.checkpoint_saver import Saver
from megatron_share4v.train.data_feed import StepData, feed
from megatron_share4v.train.fp8_divergence import Gap, Guard
from megatron_share4v.train.lr_schedule import learning_rate_factor
from megatron_share4v.train.preview import preview
from megatron_share4v.train.quarantine_log import Quarantine, warn_of
from megatron_share4v.train.run_card import RunCard
from megatron_share4v.train.spike_detection import Judge
from megatron_share4v.train.step import StepResult, pass_over, train_step, validation_loss
from megatron_share4v.train.step_flops import step_flops


def run(config: RunConfig) -> None:
    """Train until the last step. A second call with the same run directory goes on from its newest whole checkpoint."""
    kill_on_launcher_exit()
    with disk_errors_as_config_error(Path(config.run.directory)):
        _run(config)


def _run(config: RunConfig) -> None:
    world = World.from_environment()
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    directory = Path(config.run.directory)
    configure(rank=world.rank, directory=directory / "log")
    timeout_s = config.parallel.timeout_s
    signals, watch = (
        Signals(),
        Heartbeat(directory, rank=world.rank, ranks=world.size, timeouts=PhaseTimeouts.from_config(config)),
    )
    words = ErrorReport(directory / "log", rank=world.rank, ranks=world.size, position=lambda: watch.position)
    with (
        signals.heard(),
        words.record_errors(),
        process_group(world, device, timeout_s=timeout_s),
        exclusive_run(directory, rank=world.rank),
    ):
        # Whatever a user has to do from here on, the watch says to whoever would start the run again.
        with watch.running(), disk_errors_as_config_error(directory):
            check_ranks_consistent(config)
            check_wandb(config)
            layout = Layout.for_world(config.parallel, world_size=world.size)
            with open_mesh(layout, device=device, timeout_s=timeout_s) as mesh:
                watch.enter("build")
                training = build(config, mesh=mesh)
                run_on_rank0(lambda: (directory / "config.yaml").write_text(dump(config)))
                train(training, watch=watch, signals=signals, words=words)


def train(
    training: Training,
    *,
    watch: Heartbeat | None = None,
    signals: Signals | None = None,
    words: ErrorReport | None = None,
) -> None:
    """All remaining steps of a run that is built. Raises RunStopped, with everything saved, when it was asked to end before the last."""
    if training.start_step >= training.total_steps:
        get_logger().info("nothing to do: step %d of %d is already made", training.start_step, training.total_steps)
        return
    mesh = training.mesh
    Loop(
        training,
        watch or Heartbeat(training.directory, rank=mesh.rank, ranks=mesh.layout.world_size),
        signals or Signals(),
        words,
    ).run()


class Loop:
    """What the steps of one run share. Every rank has one."""

    def __init__(self, training: Training, watch: Heartbeat, signals: Signals, words: ErrorReport | None) -> None:
        config, mesh, start, directory = training.config, training.mesh, training.start_step, training.directory
        self.training, self.watch, self.words, self.card = training, watch, words, RunCard(training)
        self.ledger = Ledger(directory / METRICS if mesh.rank == 0 else None, device=mesh.device, start_step=start)
        self.ledger.watch(training.chunks)
        self.profiler = Profiler(config.log.profile, directory=directory, device=mesh.device, rank=mesh.rank)
        self.writers = _open_writers(training) if mesh.rank == 0 else None
        self.timekeeper = TimeLimit(config) if mesh.rank == 0 else None
        self.saver = Saver(training, timekeeper=self.timekeeper)
        self.ballot = Ballot(signals, self.timekeeper, failed=self.saver.has_failed)
        self.skips = share_skip_steps(directory, after=start)
        self.judge, self.bad_steps = (
            Judge(config.train.bad_steps, mesh=mesh),
            BadSteps(training, saved=self.saver.finish),
        )
        self.judge.remember(directory / METRICS, to_step=start)
        self.pace = StragglerMonitor(
            training.chunks, mesh=mesh, every=config.log.ranks_every_steps, factor=config.log.slow_rank_factor
        )
        parts = {"chunks": training.chunks, "optimizer": training.optimizer, "mesh": mesh}
        self.guard = Guard(precision=config.precision, micro_batch_size=config.train.micro_batch_size, **parts)
        self.validation = _validation_steps(training)
        self.quarantine = Quarantine(
            directory, mesh=mesh, start_step=start, max_fraction=config.data.max_faulty_fraction
        )

    def run(self) -> None:
        """From the first remaining step to the last, or to the one after which the run was asked to end."""
        training, without = self.training, frozenset(step - 1 for step in self.skips)
        steps = feed(
            training.source,
            mesh=training.mesh,
            start_step=training.start_step,
            stop_step=training.total_steps,
            without=without,
        )
        self.watch.enter("data", step=training.start_step + 1)
        # What a failing rank says is said before its world is left, which may take long.
        kept = self.words.record_errors() if self.words is not None else contextlib.nullcontext()
        with kept, self.card.failing(), disk_errors_as_config_error(training.directory), contextlib.closing(steps):
            for data in steps:
                step, agreed = data.items.step + 1, self.make_step(data)
                if self.timekeeper is not None:
                    self.timekeeper.step_ended()
                announce(agreed, step=step)
                self.check_and_save(step, agreed)
                if agreed.stop is not None:
                    break
                self.watch.enter("data", step=step + 1)
        self.watch.pause("save")
        self.saver.finish()
        self.profiler.close()
        self.quarantine.close()
        if self.writers is not None:
            self.writers.close()
        if agreed.stop is not None and step < training.total_steps:
            what = f"{agreed.stop}; saved after step {step} of {training.total_steps} in {training.checkpoints}"
            self.card.end(f"stopped: {what}")
            raise RunStopped(f"{what}. The same command goes on from there")
        self.card.end("finished")

    def make_step(self, data: StepData) -> Agreed:
        """One update, and everything about it that is written."""
        training, config, writers = self.training, self.training.config, self.writers
        started, step = time.perf_counter(), data.items.step + 1
        self.watch.enter("compute")
        gap = None if step in self.skips else self.guard.check(step, data)
        factor = learning_rate_factor(step - 1, schedule=config.schedule, total_steps=training.total_steps)
        with self.profiler.step(step):
            result = self._train_step(data, factor=factor)
        training.mesh.device.synchronize()
        seconds = time.perf_counter() - started + data.wait_s
        booked = self.ledger.line(step_s=seconds - data.wait_s, data_wait_s=data.wait_s)
        self.watch.pause("after")
        paces = self.pace.step_ended(step, seconds=seconds, data_wait_s=data.wait_s)
        if paces is not None and writers is not None:
            writers.ranks(paces, step=step)
        checked = (
            _validate(training, self.validation) if _due(step, config.train.validate_every_steps, training) else None
        )
        faulty = self.quarantine.settle(data, consumed=sum(training.source.plan.consumed(step).values()))
        if writers is not None:
            record = _record(
                training,
                data,
                result,
                seconds=seconds,
                factor=factor,
                validation_loss=checked,
                faulty=faulty,
                gap=gap,
                ledger=booked,
            )
            writers.write(record, keys=[training.source.index.key(row) for row in data.items.rows])
        if (weights_of := self.bad_steps.settle(data, result)) is not None:
            self.judge.remember(training.directory / METRICS, to_step=weights_of)
        if _due(step, config.train.preview_every_steps, training):
            _show(training, writers, step=step)
        return self.ballot.count(result.votes)

    def check_and_save(self, step: int, agreed: Agreed) -> None:
        """What is due after `step`."""
        if agreed.failed:
            self.saver.finish()
        save_due, check_every = (
            self.saver.is_due(step, agreed),
            self.training.config.parallel.check_replicas_every_steps,
        )
        if check_every and (save_due or step % check_every == 0):
            check_replicas(self.training.chunks, mesh=self.training.mesh, step=step)
        if save_due:
            self.watch.pause("save")
            with self.ledger.saving():
                self.saver.save(step)
            if self.training.mesh.rank == 0:
                draw_goodput(self.training.directory)

    def _train_step(self, data: StepData, *, factor: float) -> StepResult:
        training, config = self.training, self.training.config
        reason = self.skips.get(data.items.step + 1)
        if reason is not None:
            return pass_over(reason, mesh=training.mesh, votes=self.ballot.votes)
        return train_step(
            training.chunks,
            training.optimizer,
            replace(data, batches=self.watch.counting(data.batches)),
            mesh=training.mesh,
            micro_batch_size=config.train.micro_batch_size,
            normalize=config.loss.normalize,
            learning_rate_factor=factor,
            clip_grad_norm=config.optim.clip_grad_norm,
            judge=self.judge,
            votes=self.ballot.votes,
        )


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
        wandb=WandbSink(training.config) if log.wandb is not None else None,
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
    return validation_loss(
        training.chunks, steps, mesh=training.mesh, micro_batch_size=training.config.train.micro_batch_size
    )


def _show(training: Training, writers: RunWriters | None, *, step: int) -> None:
    source = training.validation or training.source
    train = training.config.train
    shown = preview(
        source, training.chunks, mesh=training.mesh, samples=train.preview_samples, max_new_tokens=train.preview_tokens
    )
    if shown is not None and writers is not None:
        writers.preview(shown, step=step)


def _record(
    training: Training,
    data: StepData,
    result: StepResult,
    *,
    seconds: float,
    factor: float,
    validation_loss: float | None,
    faulty: int,
    gap: Gap | None,
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
        padding_fraction=1.0 - items.tokens / items.positions,
        step_time_s=seconds,
        data_wait_s=data.wait_s,
        tokens_per_s_per_gpu=items.tokens / seconds / world,
        model_tflops_per_s_per_gpu=achieved / 1e12,
        mfu=achieved / gpu.bf16 if gpu else None,
        hardware_tflops_per_s_per_gpu=computed / 1e12,
        hfu=computed / gpu.bf16 if gpu else None,
        peak_memory_bytes=mesh.device.peak_memory_bytes(),
        skipped=result.skipped,
        skip_reason=result.bad,
        faulty_samples=faulty,
        validation_loss=validation_loss,
        fp8_loss_gap=gap.loss if gap else None,
        fp8_norm_gap=gap.norm if gap else None,
        ledger=ledger,
    )

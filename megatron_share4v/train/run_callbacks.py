"""Callbacks that connect a run's steps to resilience/ and observability/; train/loop.py lists them in order."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace

from megatron_share4v.data.store.quarantine import QuarantineLog, format_faults
from megatron_share4v.logging import get_logger
from megatron_share4v.observability.goodput import GoodputTracker, draw_goodput
from megatron_share4v.observability.profiler import Profiler
from megatron_share4v.observability.run_card import RunCard
from megatron_share4v.observability.writers import METRICS, RunWriters, reopen
from megatron_share4v.parallel.collectives import gather_objects
from megatron_share4v.resilience.fp8_divergence import Fp8DivergenceCheck
from megatron_share4v.resilience.heartbeat import Heartbeat
from megatron_share4v.resilience.replica_checksum import check_replicas
from megatron_share4v.resilience.shutdown import log_stop
from megatron_share4v.resilience.straggler import StragglerMonitor
from megatron_share4v.resilience.time_limit import TimeLimit
from megatron_share4v.train.build import Training
from megatron_share4v.train.callbacks import Callback, StepState
from megatron_share4v.train.checkpoint_saver import Saver
from megatron_share4v.train.data_feed import StepData, feed
from megatron_share4v.train.preview import generate_preview
from megatron_share4v.train.run_facts import collect_run_facts, describe_start
from megatron_share4v.train.step import StepSettings, compute_gradients, validation_loss
from megatron_share4v.train.step_metrics import make_step_record


class HeartbeatCallback(Callback):
    """Tells the heartbeat which phase of which step this rank is in."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def before_data(self, step: int) -> None:
        """Begin the step, which also ends the one before."""
        self._heartbeat.enter("data", step=step)

    def before_step(self, state: StepState) -> None:
        """Enter the phase that the step timeout bounds."""
        self._heartbeat.enter("compute")

    def after_step(self, state: StepState) -> None:
        """Leave the bounded part of the step."""
        self._heartbeat.pause("after")

    @contextlib.contextmanager
    def during_save(self, state: StepState) -> Iterator[None]:
        """Enter the save, which has no step timeout."""
        self._heartbeat.pause("save")
        yield

    def on_run_end(self, status: str) -> None:
        """Enter the wait for the last background save."""
        self._heartbeat.pause("save")


class Fp8DivergenceCallback(Callback):
    """Compares FP8 with the dtype of the weights before some steps."""

    def __init__(self, training: Training, settings: StepSettings) -> None:
        self._training = training
        self._settings = replace(settings, normalize="tokens", control_flags=tuple, on_micro_batch=None)
        self._check = Fp8DivergenceCheck(precision=training.config.precision, chunks=training.chunks)

    def before_step(self, state: StepState) -> None:
        """Run the check when it is due; the step itself zeroes the gradients again."""
        if state.skip_list_reason is not None or not self._check.is_due(state.step):
            return
        layout, training = self._training.mesh.layout, self._training
        # The interleaved schedule needs at least as many micro-batches as pipeline ranks.
        count = layout.pipeline if layout.virtual > 1 else 1

        def measure() -> tuple[float, float]:
            gradients = compute_gradients(
                training.chunks, training.optimizer, state.data, settings=self._settings, micro_batches=count
            )
            return gradients.loss, gradients.norm

        state.fp8_gap = self._check.check(state.step, measure)


class ProfilerCallback(Callback):
    """Records profiler traces of the configured steps."""

    def __init__(self, training: Training) -> None:
        mesh = training.mesh
        self._profiler = Profiler(
            training.config.log.profile, directory=training.directory, device=mesh.device, rank=mesh.rank
        )

    def during_update(self, state: StepState) -> contextlib.AbstractContextManager[None]:
        """Record the update of a step in range."""
        return self._profiler.step(state.step)

    def on_run_end(self, status: str) -> None:
        """Write the trace of a run that ends inside the range."""
        self._profiler.close()


class GoodputCallback(Callback):
    """Accounts the wall-clock time of the run and draws goodput.png at each save."""

    def __init__(self, training: Training) -> None:
        mesh = training.mesh
        metrics = training.directory / METRICS if mesh.rank == 0 else None
        self._training = training
        self._tracker = GoodputTracker(metrics, device=mesh.device, start_step=training.start_step)
        for chunk in training.chunks:
            chunk.communication_timer = self._tracker.communication.time

    def after_step(self, state: StepState) -> None:
        """Account the time since the previous step."""
        wait_s = state.data.wait_s
        state.goodput_accounts = self._tracker.account_step(step_s=state.seconds - wait_s, data_wait_s=wait_s)

    @contextlib.contextmanager
    def during_save(self, state: StepState) -> Iterator[None]:
        """Account the save."""
        with self._tracker.time_save():
            yield
        if self._training.mesh.rank == 0:
            draw_goodput(self._training.directory)


class StragglerCallback(Callback):
    """Compares the speed of ranks every log.ranks_every_steps."""

    def __init__(self, training: Training, writers: RunWriters | None) -> None:
        log = training.config.log
        self._writers = writers
        self._monitor = StragglerMonitor(
            training.chunks, mesh=training.mesh, every=log.ranks_every_steps, factor=log.slow_rank_factor
        )

    def after_step(self, state: StepState) -> None:
        """Count the step and write the comparison when it is due. Collective then."""
        found = self._monitor.step_ended(state.step, seconds=state.seconds, data_wait_s=state.data.wait_s)
        if found is not None and self._writers is not None:
            self._writers.write_rank_timings(found, step=state.step)


class ValidationCallback(Callback):
    """Measures the validation loss on the same few batches each time, read once."""

    def __init__(self, training: Training, settings: StepSettings) -> None:
        self._training, self._settings, self._steps = training, settings, list[StepData]()
        if training.validation is None:
            return
        count = training.config.train.validation_batches
        self._steps += feed(training.validation, mesh=training.mesh, after_step=0, last_step=count)
        for data in self._steps:
            if data.faults:
                get_logger().warning(
                    "validation: %d samples could not be read; they are left out of the loss:%s",
                    len(data.faults),
                    format_faults(data.faults),
                )

    def after_step(self, state: StepState) -> None:
        """Measure the loss when it is due. Collective."""
        training = self._training
        if self._steps and is_due(state.step, training.config.train.validate_every_steps, training):
            state.validation_loss = validation_loss(training.chunks, self._steps, settings=self._settings)


class QuarantineCallback(Callback):
    """Records samples that could not be read."""

    def __init__(self, training: Training) -> None:
        path = training.directory / QuarantineLog.FILE
        log = reopen(path, keep_to_step=training.start_step) if training.mesh.rank == 0 else None
        self._sampler = training.source.sampler
        self._log = QuarantineLog(path, log, max_fraction=training.config.data.max_faulty_fraction)

    def after_step(self, state: StepState) -> None:
        """Record the faults of the step; collective when any rank has one."""
        data = state.data
        if data.faulty_rows:
            rows, consumed = data.items.rows.tolist(), sum(self._sampler.consumed(state.step).values())
            state.faulty_samples = self._log.record(data.faults, step=state.step, rows=rows, consumed=consumed)

    def on_run_end(self, status: str) -> None:
        """Close the file."""
        self._log.close()


class MetricsCallback(Callback):
    """Writes the metrics of each step on rank 0."""

    def __init__(self, training: Training, writers: RunWriters | None) -> None:
        self._training, self._writers = training, writers

    def after_step(self, state: StepState) -> None:
        """Write the record of the step and the keys of its samples."""
        if self._writers is not None:
            keys = [self._training.source.index.key(row) for row in state.data.items.rows]
            self._writers.write(make_step_record(self._training, state), keys=keys)

    def on_run_end(self, status: str) -> None:
        """Flush and close all files."""
        if self._writers is not None:
            self._writers.close()


class PreviewCallback(Callback):
    """Writes answers of the model to held-out images."""

    def __init__(self, training: Training, writers: RunWriters | None) -> None:
        self._training, self._writers = training, writers

    def after_step(self, state: StepState) -> None:
        """Generate and write the answers when they are due. Collective."""
        training, train = self._training, self._training.config.train
        if not is_due(state.step, train.preview_every_steps, training):
            return
        preview = generate_preview(
            training.validation or training.source,
            training.chunks,
            mesh=training.mesh,
            samples=train.preview_samples,
            max_new_tokens=train.preview_tokens,
        )
        if preview is not None and self._writers is not None:
            self._writers.write_preview(preview, step=state.step)


class ShutdownCallback(Callback):
    """Measures how long steps take for the time limit, and logs why the run stops."""

    def __init__(self, time_limit: TimeLimit | None) -> None:
        self._time_limit = time_limit

    def after_step(self, state: StepState) -> None:
        """Record the end of the step, with all that ran after it but the save."""
        if self._time_limit is not None:
            self._time_limit.step_ended()
        log_stop(state.decision, step=state.step)


class SaveCompletionCallback(Callback):
    """Raises the error of a failed background save on all ranks."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def after_step(self, state: StepState) -> None:
        """Raise when a save has failed on any rank."""
        if state.decision.save_failed:
            self._saver.finish()

    def on_run_end(self, status: str) -> None:
        """Wait for the last save."""
        self._saver.finish()


class ReplicaChecksumCallback(Callback):
    """Compares the weights of DP replicas every parallel.check_replicas_every_steps and before each save."""

    def __init__(self, training: Training) -> None:
        self._training, self._every = training, training.config.parallel.check_replicas_every_steps

    def after_step(self, state: StepState) -> None:
        """Compare when it is due. Collective; raises DamageError."""
        if self._every and (state.save_due or state.step % self._every == 0):
            check_replicas(self._training.chunks, mesh=self._training.mesh, step=state.step)


class RunCardCallback(Callback):
    """Writes the run card at the start and the end of the run."""

    def __init__(self, training: Training) -> None:
        """Write the card of this start. Collective."""
        hosts = gather_objects(socket.gethostname())
        self._card: RunCard | None = None
        if training.mesh.rank == 0:
            start, facts = describe_start(training, hosts), collect_run_facts(training, hosts)
            self._card = RunCard(training.directory, start=start, facts=facts)

    def on_run_end(self, status: str) -> None:
        """Write the card with the final status."""
        if self._card is not None:
            self._card.end(status)

    def on_error(self, error: BaseException) -> None:
        """Write the card with the error as the status."""
        if self._card is not None:
            self._card.end(f"failed: {type(error).__name__}: {error}")


def is_due(step: int, every: int, training: Training) -> bool:
    """Whether something that happens every so many steps, and after the last, happens after `step`; 0 means never."""
    return bool(every) and (step % every == 0 or step == training.last_step)

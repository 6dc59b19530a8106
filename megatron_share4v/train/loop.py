"""The step loop of a run: set up, build, then for each step get data, train, run callbacks and save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_share4v.config.load import dump
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import RunStopped, disk_errors_as_config_error
from megatron_share4v.logging import configure, get_logger
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.observability.wandb_writer import WandbWriter, check_wandb
from megatron_share4v.observability.writers import METRICS, RunWriters
from megatron_share4v.parallel.collectives import run_on_rank0
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, kill_on_launcher_exit, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.resilience.error_report import ErrorReport
from megatron_share4v.resilience.heartbeat import Heartbeat, PhaseTimeouts
from megatron_share4v.resilience.preflight.consistency import check_ranks_consistent
from megatron_share4v.resilience.run_lock import exclusive_run
from megatron_share4v.resilience.shutdown import ControlFlags, StopSignals
from megatron_share4v.resilience.skip_steps import share_skip_steps
from megatron_share4v.resilience.spike_detection import SpikeDetector
from megatron_share4v.resilience.time_limit import TimeLimit
from megatron_share4v.train import run_callbacks
from megatron_share4v.train.bad_steps import BadStepsCallback
from megatron_share4v.train.build import Training, build
from megatron_share4v.train.callbacks import Callback, StepState
from megatron_share4v.train.checkpoint_saver import Saver
from megatron_share4v.train.data_feed import StepData, feed
from megatron_share4v.train.lr_schedule import learning_rate_factor
from megatron_share4v.train.step import StepSettings, skip_step, train_step


def run(config: RunConfig) -> None:
    """Train until the last step, from the newest complete checkpoint of the run directory where there is one."""
    kill_on_launcher_exit()
    with disk_errors_as_config_error(Path(config.run.directory)):
        _run(config)


def _run(config: RunConfig) -> None:
    world = World.from_environment()
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    directory, timeout_s = Path(config.run.directory), config.parallel.timeout_s
    configure(rank=world.rank, directory=directory / "log")
    signals, timeouts = StopSignals(), PhaseTimeouts.from_config(config)
    heartbeat = Heartbeat(directory, rank=world.rank, ranks=world.size, timeouts=timeouts)
    report = ErrorReport(directory / "log", rank=world.rank, ranks=world.size, position=lambda: heartbeat.position)
    with (
        signals.installed(),
        report.record_errors(),
        process_group(world, device, timeout_s=timeout_s),
        exclusive_run(directory, rank=world.rank),
    ):
        # From here on, errors of the user's input reach the supervisor through the heartbeat's final state.
        with heartbeat.running(), disk_errors_as_config_error(directory):
            check_ranks_consistent(config)
            check_wandb(config)
            layout = Layout.for_world(config.parallel, world_size=world.size)
            with open_mesh(layout, device=device, timeout_s=timeout_s) as mesh:
                heartbeat.enter("build")
                training = build(config, mesh=mesh)
                run_on_rank0(lambda: (directory / "config.yaml").write_text(dump(config)))
                train(training, heartbeat=heartbeat, signals=signals, error_report=report)


def train(
    training: Training,
    *,
    heartbeat: Heartbeat | None = None,
    signals: StopSignals | None = None,
    error_report: ErrorReport | None = None,
) -> None:
    """Train all remaining steps of a built run. Raises RunStopped, after a save, when it stops before the last."""
    if training.start_step >= training.last_step:
        get_logger().info("nothing to do: step %d of %d is already made", training.start_step, training.last_step)
        return
    mesh = training.mesh
    heartbeat = heartbeat or Heartbeat(training.directory, rank=mesh.rank, ranks=mesh.layout.world_size)
    Loop(training, heartbeat, signals or StopSignals(), error_report).run()


class Loop:
    """The steps of one run on this rank, and the callbacks around them."""

    def __init__(
        self, training: Training, heartbeat: Heartbeat, signals: StopSignals, error_report: ErrorReport | None
    ) -> None:
        """Open everything that the steps share. Collective."""
        config, mesh = training.config, training.mesh
        self._training, self._error_report = training, error_report
        run_card = run_callbacks.RunCardCallback(training)
        time_limit = TimeLimit(config) if mesh.rank == 0 else None
        self._saver = Saver(training, time_limit=time_limit)
        self._flags = ControlFlags(signals, time_limit, save_failed=self._saver.has_failed)
        self._skip_list = share_skip_steps(training.directory, after=training.start_step)
        detector = SpikeDetector(config.train.bad_steps, mesh=mesh)
        detector.restore(training.directory / METRICS, to_step=training.start_step)
        self._settings = settings = StepSettings(
            mesh=mesh,
            micro_batch_size=config.train.micro_batch_size,
            normalize=config.loss.normalize,
            clip_grad_norm=config.optim.clip_grad_norm,
            detect_bad_step=detector,
            control_flags=self._flags.read,
            on_micro_batch=heartbeat.begin_micro_batch,
        )
        goodput = run_callbacks.GoodputCallback(training)
        writers = _open_writers(training) if mesh.rank == 0 else None
        self._callbacks: list[Callback] = [
            run_callbacks.HeartbeatCallback(heartbeat),
            run_callbacks.Fp8DivergenceCallback(training, settings),
            run_callbacks.ProfilerCallback(training),
            goodput,
            run_callbacks.StragglerCallback(training, writers),
            run_callbacks.ValidationCallback(training, settings),
            run_callbacks.QuarantineCallback(training),
            run_callbacks.MetricsCallback(training, writers),
            BadStepsCallback(training, detector, wait_for_saves=self._saver.finish),
            run_callbacks.PreviewCallback(training, writers),
            run_callbacks.ShutdownCallback(time_limit),
            run_callbacks.SaveCompletionCallback(self._saver),
            run_callbacks.ReplicaChecksumCallback(training),
            run_card,
        ]

    def run(self) -> None:
        """Train from the first remaining step to the last, or to the one after which the run stops."""
        training = self._training
        steps = feed(
            training.source,
            mesh=training.mesh,
            after_step=training.start_step,
            last_step=training.last_step,
            skip_steps=self._skip_list.keys(),
        )
        self._before_data(training.start_step + 1)
        # The error report is written before the process group is left, which may take long.
        report = self._error_report.record_errors() if self._error_report is not None else contextlib.nullcontext()
        disk_errors = disk_errors_as_config_error(training.directory)
        with report, self._errors_to_callbacks(), disk_errors, contextlib.closing(steps):
            for data in steps:
                state = self._run_step(data)
                if state.decision.stop_reason is not None:
                    break
                self._before_data(state.step + 1)
        self._end(state)

    def _run_step(self, data: StepData) -> StepState:
        """Train one step, run the callbacks and save when it is due."""
        training, started = self._training, time.perf_counter()
        factor = learning_rate_factor(
            data.step_index, schedule=training.config.schedule, total_steps=training.total_steps
        )
        state = StepState(data, self._skip_list.get(data.step), factor)
        for callback in self._callbacks:
            callback.before_step(state)
        with contextlib.ExitStack() as stack:
            for callback in self._callbacks:
                stack.enter_context(callback.during_update(state))
            self._update(state)
        training.mesh.device.synchronize()
        state.seconds = time.perf_counter() - started + data.wait_s
        state.decision = self._flags.decide(state.result.control_flags)
        state.save_due = self._saver.is_due(state.step, state.decision)
        for callback in self._callbacks:
            callback.after_step(state)
        if state.save_due:
            self._save(state)
        return state

    def _update(self, state: StepState) -> None:
        if state.skip_list_reason is not None:
            state.result = skip_step(state.skip_list_reason, settings=self._settings)
            return
        state.result = train_step(
            self._training.chunks,
            self._training.optimizer,
            state.data,
            settings=self._settings,
            learning_rate_factor=state.learning_rate_factor,
        )

    def _save(self, state: StepState) -> None:
        with contextlib.ExitStack() as stack:
            for callback in self._callbacks:
                stack.enter_context(callback.during_save(state))
            self._saver.save(state.step)

    def _before_data(self, step: int) -> None:
        for callback in self._callbacks:
            callback.before_data(step)

    @contextlib.contextmanager
    def _errors_to_callbacks(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            for callback in self._callbacks:
                callback.on_error(error)
            raise

    def _end(self, state: StepState) -> None:
        """Close everything after the last step `state`. Raises RunStopped when the run stopped before its end."""
        training, step, reason = self._training, state.step, state.decision.stop_reason
        stopped = ""
        if reason is not None and step < training.last_step:
            stopped = f"{reason}; saved after step {step} of {training.total_steps} in {training.checkpoints}"
        status = f"stopped: {stopped}" if stopped else "finished"
        if status == "finished" and step < training.total_steps:
            status = f"ended by run.exit_at_step after step {step} of {training.total_steps}"
            get_logger().info("%s; a start without it goes on from there", status)
        for callback in self._callbacks:
            callback.on_run_end(status)
        if stopped:
            raise RunStopped(f"{stopped}. The same command goes on from there")


def _open_writers(training: Training) -> RunWriters:
    log = training.config.log
    return RunWriters(
        training.directory,
        start_step=training.start_step,
        total_steps=training.total_steps,
        console_every=log.every_steps,
        sample_keys=log.sample_keys,
        tensorboard=log.tensorboard,
        wandb=WandbWriter(training.config) if log.wandb is not None else None,
    )

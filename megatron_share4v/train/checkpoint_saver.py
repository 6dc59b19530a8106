"""Saving of a run: when a checkpoint is due, writing it now or in the background, removal of old ones."""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_share4v.checkpoint.assets import FOLDER, asset_files
from megatron_share4v.checkpoint.retention import remove_old_checkpoints
from megatron_share4v.checkpoint.store import CheckpointContents, FinishSave, RunState, start_save
from megatron_share4v.config.load import dump
from megatron_share4v.data.sampling.fingerprint import describe_data
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.async_writer import HostBuffers
from megatron_share4v.resilience.shutdown import StepDecision
from megatron_share4v.resilience.time_limit import TimeLimit
from megatron_share4v.train.build import Training

SAVE_TIMEOUT = timedelta(hours=2)
"""Timeout of the background collectives, which wait for the slowest writer and for the hashes of all files."""
NICENESS = 19
"""CPU priority of the background thread."""


class Saver:
    """Writes the checkpoints of a run and removes old ones; all ranks call it at the same steps."""

    def __init__(self, training: Training, *, time_limit: TimeLimit | None) -> None:
        """time_limit: records how long saves take; None on all ranks but rank 0. Collective."""
        self._training, self._time_limit = training, time_limit
        self._buffers: HostBuffers | None = None
        self._group: dist.ProcessGroup | None = None
        if training.config.checkpoint.in_background:
            # A group of its own, since these collectives run beside those of training; gloo, so none waits for a GPU.
            self._buffers, self._group = HostBuffers(), dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def is_due(self, step: int, decision: StepDecision) -> bool:
        """Whether to save after `step`: at the end, when the run stops, every every_steps or every_minutes."""
        every = self._training.config.checkpoint.every_steps
        return (
            decision.save
            or decision.stop_reason is not None
            or step == self._training.last_step
            or bool(every and step % every == 0)
        )

    def has_failed(self) -> bool:
        """Whether a background save has failed on this rank; `finish` then raises its error."""
        return self._error is not None

    def save(self, step: int) -> None:
        """Save the run after `step`, or begin to in the background. Collective.

        Raises CheckpointError, on all ranks, when this save or the previous one cannot be written.
        """
        started = time.perf_counter()
        self.finish()
        waited = time.perf_counter() - started
        training, started = self._training, time.perf_counter()
        if self._time_limit is not None:
            self._time_limit.save_started()
        contents = CheckpointContents(
            chunks=training.chunks,
            optimizer=training.optimizer,
            mesh=training.mesh,
            state=_state(training, step),
            config_text=dump(training.config),
            assets=asset_files(training.directory / FOLDER),
            buffers=self._buffers,
        )
        complete = start_save(training.checkpoints, contents)
        if self._buffers is None:
            self._complete(complete, started)
            dist.barrier()
        else:
            get_logger().info(
                "checkpoint: step %d copied in %.2f s, after waiting %.2f s for the previous save",
                step,
                time.perf_counter() - started,
                waited,
            )
            self._thread = threading.Thread(
                target=self._complete_in_background, args=(complete, started), name="save", daemon=True
            )
            self._thread.start()
        if self._time_limit is not None:
            self._time_limit.training_resumed()

    def finish(self) -> None:
        """Wait for the background save. Raises CheckpointError, on all ranks, when it has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _complete_in_background(self, complete: FinishSave, started: float) -> None:
        if sys.platform == "linux":  # other systems have no priority per thread
            # Lower the priority of this thread and the threads that it starts.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._complete(complete, started)
        except BaseException as error:
            self._error = error

    def _complete(self, complete: FinishSave, started: float) -> None:
        checkpoint, training = self._training.config.checkpoint, self._training
        complete(self._group)
        if training.mesh.rank == 0:
            remove_old_checkpoints(
                training.checkpoints, keep_last=checkpoint.keep_last, keep_every_steps=checkpoint.keep_every_steps
            )
        if self._time_limit is not None:
            self._time_limit.save_ended(seconds=time.perf_counter() - started)


def _state(training: Training, step: int) -> RunState:
    source = training.source
    return RunState(
        step=step,
        consumed_samples=sum(source.sampler.consumed(step).values()),
        plan_fingerprint=source.sampler.fingerprint,
        data=describe_data(source.sampler, source.encoder),
    )

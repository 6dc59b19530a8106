"""When a run is saved, and what is saved beside its tensors."""

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
from megatron_share4v.resilience.shutdown import Agreed
from megatron_share4v.resilience.time_limit import TimeLimit
from megatron_share4v.train.build import Training

LONGEST_SAVE = timedelta(hours=2)
"""In the background the ranks wait so long for the slowest writer, and for the hashes of what all have written."""
NICE = 19


class Saver:
    """Writes a run's checkpoints and removes old ones. Every rank has one and calls it at the same steps."""

    def __init__(self, training: Training, *, timekeeper: TimeLimit | None) -> None:
        """timekeeper: is told how long saves take; None on the ranks that keep no time. Collective."""
        self._training, self._timekeeper = training, timekeeper
        self._buffers, self._group = None, None
        if training.config.checkpoint.in_background:
            # Its messages must not come between those of training. The CPU's backend: nothing of it is to wait for a GPU.
            self._buffers, self._group = HostBuffers(), dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def is_due(self, step: int, agreed: Agreed) -> bool:
        """Whether the run is saved after `step`: at its end, every so many steps or minutes, and when it is stopped."""
        every = self._training.config.checkpoint.every_steps
        return (
            agreed.save
            or agreed.stop is not None
            or step == self._training.total_steps
            or bool(every and step % every == 0)
        )

    def has_failed(self) -> bool:
        """Whether a save in the background has failed; `finish` then says why."""
        return self._error is not None

    def save(self, step: int) -> None:
        """Save the run as it is after `step`, or begin to. Raises CheckpointError, on all ranks, when it, or the save before, cannot be written."""
        started = time.perf_counter()
        self.finish()
        waited = time.perf_counter() - started
        training, started = self._training, time.perf_counter()
        if self._timekeeper is not None:
            self._timekeeper.save_started()
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
                "checkpoint: step %d copied in %.2f s, after waiting %.2f s for the save before",
                step,
                time.perf_counter() - started,
                waited,
            )
            self._thread = threading.Thread(
                target=self._complete_in_background, args=(complete, started), name="save", daemon=True
            )
            self._thread.start()
        if self._timekeeper is not None:
            self._timekeeper.training_resumed()

    def finish(self) -> None:
        """Wait until nothing is being written. Raises CheckpointError, on all ranks, when that could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _complete_in_background(self, complete: FinishSave, started: float) -> None:
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            # Of this thread and those that it starts: training comes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
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
        if self._timekeeper is not None:
            self._timekeeper.save_ended(seconds=time.perf_counter() - started)


def _state(training: Training, step: int) -> RunState:
    source = training.source
    return RunState(
        step=step,
        consumed_samples=sum(source.plan.consumed(step).values()),
        plan_fingerprint=source.plan.fingerprint,
        data=describe_data(source.plan, source.encoder),
    )

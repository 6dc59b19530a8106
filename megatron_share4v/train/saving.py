"""When a run is saved, and what is saved beside its tensors."""

from __future__ import annotations

import time

import torch.distributed as dist

from megatron_share4v.checkpoint.companions import FOLDER, companions_of
from megatron_share4v.checkpoint.keep import remove_old
from megatron_share4v.checkpoint.store import RunState, save
from megatron_share4v.config.load import dump
from megatron_share4v.data.state import describe_data
from megatron_share4v.train.build import Training
from megatron_share4v.train.keep_time import Timekeeper
from megatron_share4v.train.stop import Agreed


class Saver:
    """Writes a run's checkpoints and removes old ones. Every rank has one and calls it at the same steps."""

    def __init__(self, training: Training, *, timekeeper: Timekeeper | None) -> None:
        """timekeeper: is told how long saves take; None on the ranks that keep no time."""
        self._training, self._timekeeper = training, timekeeper

    def is_due(self, step: int, agreed: Agreed) -> bool:
        """Whether the run is saved after `step`: at its end, every so many steps or minutes, and when it is stopped."""
        every = self._training.config.checkpoint.every_steps
        return agreed.save or agreed.stop is not None or step == self._training.total_steps or bool(every and step % every == 0)

    def save(self, step: int) -> None:
        """Save the run as it is after `step`. Raises CheckpointError, on all ranks, when it cannot be written."""
        training, config, started = self._training, self._training.config, time.perf_counter()
        save(
            training.checkpoints,
            step=step,
            chunks=training.chunks,
            optimizer=training.optimizer,
            mesh=training.mesh,
            state=_state(training, step),
            config_text=dump(config),
            companions=companions_of(training.directory / FOLDER),
        )
        if training.mesh.rank == 0:
            remove_old(training.checkpoints, keep_last=config.checkpoint.keep_last, keep_every_steps=config.checkpoint.keep_every_steps)
        dist.barrier()
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

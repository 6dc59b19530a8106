"""quarantine.jsonl: every sample that could not be read while training, by name and reason; too many of them end the run, on all ranks alike."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_share4v.data.store.quarantine import Fault, describe, too_many
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.observability.writers import reopen
from megatron_share4v.parallel.collectives import broadcast_object, gather_objects
from megatron_share4v.train.data_feed import StepData

FILE = "quarantine.jsonl"


class Quarantine:
    """The failures of one run. After a resume each stands once: lines beyond the resumed step are dropped at start."""

    def __init__(self, directory: Path, *, mesh: Mesh, start_step: int, max_fraction: float) -> None:
        """Every rank opens it; only rank 0 reads and writes the file, and tells the others how many failures there were."""
        self._path, self._mesh, self._max_fraction = directory / FILE, mesh, max_fraction
        self._file = reopen(self._path, keep_to_step=start_step) if mesh.rank == 0 else None
        self.count = broadcast_object(len(self._path.read_text(encoding="utf-8").splitlines()) if mesh.rank == 0 else 0)

    def settle(self, data: StepData, *, consumed: int) -> int:
        """Write what failed in a step and return how many samples that is. consumed: samples of the run so far, this step included.

        Every rank calls this at every step. Raises DataError, on all ranks, with the list, when too many have failed.
        """
        if not data.faulty_rows:
            return 0
        told = gather_objects(data.faults)
        # The same text may have failed on the first stage and on the last; the first rank's word stands.
        by_row = {fault.row: fault for faults in reversed(told) for fault in reversed(faults)}
        faults = [by_row[row] for row in data.items.rows.tolist() if row in by_row]
        self.count += len(faults)
        self._write(faults, step=data.items.step + 1)
        if too_many(self.count, consumed=consumed, max_fraction=self._max_fraction):
            raise DataError(
                f"{self.count} of {consumed} samples could not be read, more than data.max_faulty_fraction {self._max_fraction:g} accepts; all are "
                f"listed in {self._path}. Repair the data set (tools/prepare_data.py again), or accept more. In this step:{describe(faults)}"
            )
        return len(faults)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, faults: list[Fault], *, step: int) -> None:
        if self._file is None:
            return
        for fault in faults:
            self._file.write(
                json.dumps({"step": step, "sample": fault.name, "reason": fault.reason.removeprefix(f"{fault.name}: ")})
                + "\n"
            )
        self._file.flush()
        get_logger().warning(
            "step %d: %d samples could not be read; their slots are kept without labels:%s",
            step,
            len(faults),
            describe(faults),
        )


def warn_of(steps: list[StepData], *, where: str) -> None:
    """Failures in batches that are not trained on are only told."""
    for data in steps:
        if data.faults:
            get_logger().warning(
                "%s: %d samples could not be read; they are left out of the loss:%s",
                where,
                len(data.faults),
                describe(data.faults),
            )

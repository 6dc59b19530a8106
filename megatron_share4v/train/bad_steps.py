"""Reports of bad steps (resilience/spike_detection.py); after several in a row, an error or a rollback.

bad_steps/step_<N>/ in the run directory: report.json (micro-batches with losses and sample keys, gradient norm of every
module), samples.txt (text of the samples of the worst micro-batches, trained parts marked) and their images as the
vision tower sees them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_share4v.data.prepare.audit_samples import format_sample, write_preprocessed
from megatron_share4v.data.sampling.blend import open_sample_reader
from megatron_share4v.errors import DataError, TrainingError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.gradient_norms import grad_norms_by_module
from megatron_share4v.model.initialize import SHARDING
from megatron_share4v.observability.writers import METRICS
from megatron_share4v.parallel.collectives import gather_objects
from megatron_share4v.resilience.rollback import BadStepRange, roll_back
from megatron_share4v.resilience.spike_detection import SpikeDetector
from megatron_share4v.train.build import Training
from megatron_share4v.train.callbacks import Callback, StepState
from megatron_share4v.train.data_feed import StepData

FOLDER = "bad_steps"

RankLosses = list[tuple[float, int]]
"""(loss sum, trained tokens) of each micro-batch on one rank."""


@dataclass(frozen=True)
class MicroBatchLoss:
    """One micro-batch of a bad step. number: its index on its DP rank; loss: mean over its trained tokens."""

    data_rank: int
    number: int
    loss: float
    trained_tokens: int
    rows: tuple[int, ...]


class BadStepsCallback(Callback):
    """Reports bad steps, and ends the run or rolls it back after train.bad_steps.in_a_row of them."""

    def __init__(self, training: Training, detector: SpikeDetector, *, wait_for_saves: Callable[[], None]) -> None:
        """wait_for_saves: returns when no checkpoint is being written; a rollback reads the checkpoints."""
        self._training, self._detector, self._wait_for_saves = training, detector, wait_for_saves
        self._in_a_row, self._config = 0, training.config.train.bad_steps

    def after_step(self, state: StepState) -> None:
        """Report a bad step; after too many in a row, raise TrainingError or roll back. Collective for a bad step."""
        if not state.result.skipped:
            self._in_a_row = 0
            return
        if state.skip_list_reason is not None:  # reported when it was trained
            return
        self._in_a_row += 1
        self._report(state)
        limit = self._config.in_a_row
        if not limit or self._in_a_row < limit:
            return
        first, last = state.step - self._in_a_row + 1, state.step
        reason = f"{self._in_a_row} bad steps in a row, {first} to {last}, the last because {state.result.skip_reason}"
        if self._config.then == "stop":
            raise TrainingError(
                f"{reason}; train.bad_steps.in_a_row {limit} ends the run. Reports of the steps are in "
                f"{self._training.directory / FOLDER}. Lower the learning rate, leave the samples out, or set "
                "train.bad_steps.then roll_back"
            )
        self._in_a_row = 0
        self._roll_back(BadStepRange(first, last, reason))

    def _roll_back(self, bad_steps: BadStepRange) -> None:
        training = self._training
        self._wait_for_saves()
        step = roll_back(
            training.directory,
            bad_steps,
            chunks=training.chunks,
            optimizer=training.optimizer,
        )
        self._detector.restore(training.directory / METRICS, to_step=step)

    def _report(self, state: StepState) -> None:
        """Write the report of a bad step on rank 0. Collective."""
        training, result, mesh = self._training, state.result, self._training.mesh
        norms = grad_norms_by_module(training.chunks, training.optimizer, mesh=mesh, sharding=SHARDING)
        has_losses = mesh.is_last_stage and mesh.coordinates.tensor == 0
        own_losses = [(float(part.total), part.tokens) for part in result.own_losses] if has_losses else []
        losses = gather_objects(own_losses)
        if mesh.rank:
            return
        folder = training.directory / FOLDER / f"step_{state.step}"
        folder.mkdir(parents=True, exist_ok=True)
        micro_batches = _rank_micro_batches(training, state.data, losses)
        keys = training.source.index.key
        report = {
            "step": state.step,
            "reason": result.skip_reason,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "micro_batches": [
                asdict(part) | {"rows": list(part.rows), "keys": [keys(row) for row in part.rows]}
                for part in micro_batches
            ],
            "gradient_norms": norms,
        }
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        get_logger().warning(
            "step %d is bad and was skipped: %s. %s. See %s",
            state.step,
            result.skip_reason,
            _describe_worst(micro_batches, norms),
            folder,
        )
        rows = [row for part in micro_batches for row in part.rows]
        _write_samples(training, folder, rows[: self._config.samples])


def _rank_micro_batches(training: Training, data: StepData, losses: Sequence[RankLosses]) -> list[MicroBatchLoss]:
    """Return all micro-batches of a step, those without a finite loss first, then by descending loss."""
    layout, found = training.mesh.layout, []
    by_data_rank: dict[int, list[RankLosses]] = {}
    for rank, rank_losses in enumerate(losses):
        if rank_losses:  # with context parallelism several ranks have one, each for its positions
            by_data_rank.setdefault(layout.coordinates(rank).data, []).append(rank_losses)
    for data_rank, parts in by_data_rank.items():
        planned = training.source.sampler.micro_batches(data.items, data_rank=data_rank, data_size=layout.data)
        for number, (micro_batch, *shares) in enumerate(zip(planned, *parts)):
            total, tokens = sum(share[0] for share in shares), sum(share[1] for share in shares)
            found.append(MicroBatchLoss(data_rank, number, total / max(tokens, 1), tokens, micro_batch.rows))
    return sorted(found, key=lambda part: (math.isfinite(part.loss), -part.loss if math.isfinite(part.loss) else 0.0))


def _describe_worst(micro_batches: Sequence[MicroBatchLoss], norms: dict[str, float]) -> str:
    worst = micro_batches[0]
    modules = [name for name, norm in norms.items() if not math.isfinite(norm)]
    gradient = f"largest gradient in {max(norms, key=lambda name: norms[name])}"
    if modules:
        gradient = f"the gradient is not finite in {len(modules)} of {len(norms)} modules"
    where = f"micro-batch {worst.number} of data-parallel rank {worst.data_rank}"
    return f"Worst: {where}, loss {worst.loss:.4g}; {gradient}"


def _write_samples(training: Training, folder: Path, rows: Sequence[int]) -> None:
    """Write text and images of these samples; a sample that cannot be read is listed with its error."""
    source, texts = training.source, []
    store = open_sample_reader(source.index)
    for number, row in enumerate(rows):
        try:
            sample = store.read(row, with_image=True)
            text = format_sample(
                sample,
                tokenizer=source.encoder.tokenizer,
                template=source.encoder.template,
                max_text_length=training.config.data.max_text_length,
                tokens_per_image=source.sampler.tokens_per_image,
                colour=False,
            )
            if sample.image is not None:
                write_preprocessed(sample, folder / f"{number}.png", policy=source.encoder.images)
        except DataError as error:
            text = f"--- {source.index.key(row)}: {error}"
        texts.append(f"{number}. {text}")
    store.close()
    (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")

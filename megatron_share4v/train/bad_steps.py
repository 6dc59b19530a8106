"""What is done about a step that spike_detection.py found bad: it is told, with everything that helps to find the cause, and too many in a row have consequences.

bad_steps/step_<N>/ in the run directory: report.json (micro-batches with their losses and sample keys, gradient norm of every module), samples.txt
(text of the samples of the worst micro-batches, with what is trained marked) and their images as the tower sees them.
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
from megatron_share4v.parallel.collectives import gather_objects
from megatron_share4v.train.build import Training
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.rollback import roll_back
from megatron_share4v.train.step import StepResult

FOLDER = "bad_steps"


@dataclass(frozen=True)
class MicroBatchLoss:
    """One micro-batch of a bad step. number: its place on its data-parallel rank, from 0; loss: mean over its trained tokens."""

    data_rank: int
    number: int
    loss: float
    trained_tokens: int
    rows: tuple[int, ...]


class BadSteps:
    """The bad steps of one run. Every rank has one and calls it at every step."""

    def __init__(self, training: Training, *, saved: Callable[[], None]) -> None:
        """saved: waits until no checkpoint is being written, for a rollback looks at them."""
        self._training, self._in_a_row, self._saved = training, 0, saved
        self._config = training.config.train.bad_steps

    def settle(self, data: StepData, result: StepResult) -> int | None:
        """Report a bad step; after too many in a row raise TrainingError or roll back: then the step whose weights are here now. Else None."""
        if not result.bad:
            self._in_a_row = 0
            return None
        if not data.batches:  # passed over: known already
            return None
        self._in_a_row += 1
        self._report(data, result)
        limit = self._config.in_a_row
        if not limit or self._in_a_row < limit:
            return None
        step, first = data.items.step + 1, data.items.step + 2 - self._in_a_row
        what = f"{self._in_a_row} bad steps in a row, {first} to {step}, the last because {result.bad}"
        where = self._training.directory / FOLDER
        if self._config.then == "stop":
            raise TrainingError(
                f"{what}; train.bad_steps.in_a_row {limit} ends the run. {where} says what they were. Lower the learning rate, leave the samples "
                "out, or set train.bad_steps.then roll_back"
            )
        self._in_a_row = 0
        self._saved()
        return roll_back(self._training, first_bad=first, last=step, why=what)

    def _report(self, data: StepData, result: StepResult) -> None:
        """Collective."""
        training, step = self._training, data.items.step + 1
        norms = grad_norms_by_module(training.chunks, training.optimizer, mesh=training.mesh, sharding=SHARDING)
        speaks = training.mesh.is_last_stage and training.mesh.coordinates.tensor == 0
        told = gather_objects([(float(part.total), part.tokens) for part in result.own_losses] if speaks else [])
        if training.mesh.rank:
            return
        folder = training.directory / FOLDER / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        micro_batches = _blamed(training, data, told)
        keys = training.source.index.key
        report = {
            "step": step,
            "reason": result.bad,
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
            "step %d is bad and was skipped: %s. %s. See %s", step, result.bad, _blame(micro_batches, norms), folder
        )
        _show(training, folder, [row for part in micro_batches for row in part.rows][: self._config.samples])


def _blamed(training: Training, data: StepData, told: Sequence[list[tuple[float, int]]]) -> list[MicroBatchLoss]:
    """All micro-batches of a step, those without a finite loss first, then by loss."""
    layout, found = training.mesh.layout, []
    by_data_rank: dict[int, list[list[tuple[float, int]]]] = {}
    for rank, losses in enumerate(told):
        if losses:  # several ranks under context parallelism, each with its positions
            by_data_rank.setdefault(layout.coordinates(rank).data, []).append(losses)
    for data_rank, parts in by_data_rank.items():
        planned = training.source.plan.micro_batches(data.items, data_rank=data_rank, data_size=layout.data)
        for number, (micro_batch, *losses) in enumerate(zip(planned, *parts)):
            total, tokens = (sum(numbers) for numbers in zip(*losses))
            found.append(MicroBatchLoss(data_rank, number, total / max(tokens, 1), tokens, micro_batch.rows))
    return sorted(found, key=lambda part: (math.isfinite(part.loss), -part.loss if math.isfinite(part.loss) else 0.0))


def _blame(micro_batches: Sequence[MicroBatchLoss], norms: dict[str, float]) -> str:
    worst = micro_batches[0]
    modules = [name for name, norm in norms.items() if not math.isfinite(norm)]
    gradient = (
        f"the gradient is not finite in {len(modules)} of {len(norms)} modules"
        if modules
        else f"largest gradient in {max(norms, key=norms.get)}"
    )
    return (
        f"Worst: micro-batch {worst.number} of data-parallel rank {worst.data_rank}, loss {worst.loss:.4g}; {gradient}"
    )


def _show(training: Training, folder: Path, rows: Sequence[int]) -> None:
    """Text and images of these samples; one that cannot be read is told as such."""
    source, texts = training.source, []
    store = open_sample_reader(source.index)
    for number, row in enumerate(rows):
        try:
            sample = store.read(row, with_image=True)
            texts.append(
                format_sample(
                    sample,
                    tokenizer=source.encoder.tokenizer,
                    template=source.encoder.template,
                    max_text_length=training.config.data.max_text_length,
                    tokens_per_image=source.plan.tokens_per_image,
                    colour=False,
                )
            )
            if sample.image is not None:
                write_preprocessed(sample, folder / f"{number}.png", policy=source.encoder.images)
        except DataError as error:
            texts.append(f"--- {source.index.key(row)}: {error}")
        texts[-1] = f"{number}. {texts[-1]}"
    store.close()
    (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")

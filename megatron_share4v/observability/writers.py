"""What a run leaves behind: metrics.jsonl, samples.jsonl, TensorBoard (or Weights & Biases) and console lines, all from the same record.

Only rank 0 writes. After a resume each step appears once in both files: lines beyond the resumed step are dropped at start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_share4v.logging import get_logger
from megatron_share4v.observability.hardware_counters import Counters
from megatron_share4v.observability.records import parse_line, split_lines
from megatron_share4v.observability.wandb_writer import WandbSink

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Preview:
    """pixels: [H, W, 3] uint8 of one sample, as the tower sees them before normalising. answers, wanted: of all samples, the first is the picture's."""

    pixels: torch.Tensor
    answers: tuple[str, ...]
    wanted: tuple[str, ...]

    @property
    def exact_match(self) -> float:
        """The share of answers that are the record's, but for case and space around them: of use where answers are short."""
        return sum(
            ours.strip().lower() == theirs.strip().lower() for ours, theirs in zip(self.answers, self.wanted)
        ) / len(self.answers)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl. Counts and times are of the whole step over all ranks, rates are per rank (GPU)."""

    step: int
    """1 after the first update."""
    loss: float
    grad_norm: float
    learning_rate: float
    """Of the language model (or the default group)."""
    consumed_samples: int
    trained_tokens: int
    tokens: int
    """Positions that hold text or image features."""
    images: int
    padding_fraction: float
    step_time_s: float
    data_wait_s: float
    tokens_per_s_per_gpu: float
    model_tflops_per_s_per_gpu: float
    mfu: float | None
    """Model FLOP/s over the device's BF16 peak; None where that is not known."""
    hardware_tflops_per_s_per_gpu: float = 0.0
    """With what padding, blank images and computing things twice add."""
    hfu: float | None = None
    """As mfu, of the hardware's."""
    peak_memory_bytes: int
    skipped: bool
    """Weights and optimizer state were left alone."""
    skip_reason: str = ""
    faulty_samples: int = 0
    """Samples of the step that could not be read; see quarantine.jsonl."""
    validation_loss: float | None = None
    fp8_loss_gap: float | None = None
    """Relative, where the guard has looked before this step (guard.py)."""
    fp8_norm_gap: float | None = None
    consumed_by_source: dict[str, int] = field(default_factory=dict)
    """Samples of each data set of a blend; empty for a single one."""
    ledger: dict[str, float] = field(default_factory=dict)
    """Where the time since the line before went (goodput.py); in the file each account is a key of its own."""


class RunWriters:
    """All files of one run directory, opened at the step from which the run goes on."""

    def __init__(
        self,
        directory: Path,
        *,
        start_step: int,
        total_steps: int,
        console_every: int,
        sample_keys: bool,
        tensorboard: bool,
        wandb: WandbSink | None = None,
    ) -> None:
        self._total_steps, self._console_every = total_steps, console_every
        self._metrics = reopen(directory / METRICS, keep_to_step=start_step)
        self._samples = reopen(directory / "samples.jsonl", keep_to_step=start_step) if sample_keys else None
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1) if tensorboard else None
        self._wandb = wandb
        self._counters = Counters() if tensorboard or wandb is not None else None

    def write(self, record: StepRecord, *, keys: Sequence[str] | None = None) -> None:
        """One step, everywhere."""
        values = asdict(record)
        ledger = values.pop("ledger")
        self._metrics.write(json.dumps(values | ledger) + "\n")
        self._metrics.flush()
        if self._samples is not None:
            self._samples.write(json.dumps({"step": record.step, "keys": list(keys or [])}) + "\n")
            self._samples.flush()
        del values["skip_reason"]
        values |= {f"consumed/{name}": count for name, count in values.pop("consumed_by_source").items()}
        scalars = {
            f"train/{name}": float(value) for name, value in values.items() if name != "step" and value is not None
        }
        scalars |= {f"goodput/{name}": ledger[name] for name in sorted(ledger.keys() - {"time"})}
        self._scalars(scalars | (self._counters.take() if self._counters is not None else {}), step=record.step)
        if record.step % self._console_every == 0 or record.step == self._total_steps:
            get_logger().info(self._line(record))

    def ranks(self, values: Mapping[str, float], *, step: int) -> None:
        """How the ranks compare (resilience/straggler.py)."""
        self._scalars({f"ranks/{name}": value for name, value in values.items()}, step=step)

    def preview(self, shown: Preview, *, step: int) -> None:
        """Held-out images with the model's own answers."""
        get_logger().info(
            "preview at step %d: %s (%d of its answers are the records', %.2f)",
            step,
            shown.answers[0],
            len(shown.answers),
            shown.exact_match,
        )
        if self._board is not None:
            self._board.add_image("preview/image", shown.pixels, step, dataformats="HWC")
            self._board.add_text(
                "preview/answer",
                "\n\n".join(f"{ours} (record: {theirs})" for ours, theirs in zip(shown.answers, shown.wanted)),
                step,
            )
            self._board.add_scalar("preview/exact_match", shown.exact_match, step)

    def close(self) -> None:
        """Flush and close all files."""
        for file in (self._metrics, self._samples, self._board, self._wandb, self._counters):
            if file is not None:
                file.close()

    def _scalars(self, values: Mapping[str, float], *, step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(values, step=step)

    def _line(self, record: StepRecord) -> str:
        remaining = (self._total_steps - record.step) * record.step_time_s
        validation = "" if record.validation_loss is None else f" | validation {record.validation_loss:.4f}"
        return (
            f"step {record.step}/{self._total_steps} | loss {record.loss:.4f}{validation} | grad {record.grad_norm:.3f} | "
            f"lr {record.learning_rate:.2e} | {record.tokens_per_s_per_gpu:,.0f} tokens/s/rank | {record.step_time_s:.2f} s/step "
            f"(data {record.data_wait_s:.2f}) | ETA {_duration(remaining)}"
            + (f" | SKIPPED: {record.skip_reason}" if record.skipped else "")
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def reopen(path: Path, *, keep_to_step: int):
    """Open for appending, without lines of later steps and without what is no line of a step: one cut off by a crash, or, with a warning, any other."""
    kept = []
    for number, line in enumerate(split_lines(path), 1):
        record = parse_line(line)
        if record is None and line.endswith("\n"):
            get_logger().warning("%s:%d: %.80r is not the line of a step; left out", path, number, line.strip())
        if record is not None and record["step"] <= keep_to_step:
            kept.append(line)
    if path.exists():
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(kept), encoding="utf-8")
        os.replace(replacement, path)
    return path.open("a", encoding="utf-8")

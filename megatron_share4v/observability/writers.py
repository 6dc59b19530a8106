"""Writers of a run's metrics: metrics.jsonl, samples.jsonl, TensorBoard, Weights & Biases and console lines.

Only rank 0 writes. After a resume each step appears once in both files: lines after the resumed step are dropped at
start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_share4v.files import atomic_write_text
from megatron_share4v.logging import get_logger
from megatron_share4v.observability.hardware_counters import HardwareCounters
from megatron_share4v.observability.records import parse_line, split_lines
from megatron_share4v.observability.wandb_writer import WandbWriter

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Preview:
    """Answers of the model to held-out samples, beside the reference answers; the first sample with its image."""

    pixels: torch.Tensor
    """[H, W, 3] uint8 of the first sample, as the vision tower sees it before normalisation."""
    answers: tuple[str, ...]
    references: tuple[str, ...]

    @property
    def exact_match(self) -> float:
        """Share of answers equal to the reference, ignoring case and surrounding space."""
        pairs = zip(self.answers, self.references)
        return sum(answer.strip().lower() == reference.strip().lower() for answer, reference in pairs) / len(
            self.answers
        )


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl: counts and times of the whole step over all ranks, rates per rank (GPU)."""

    step: int
    """1-based number of the step."""
    loss: float
    grad_norm: float
    learning_rate: float
    """Learning rate of the language model (or the default group)."""
    consumed_samples: int
    trained_tokens: int
    tokens: int
    """Positions that hold text or image features; padding excluded."""
    images: int
    padding_fraction: float
    step_time_s: float
    data_wait_s: float
    tokens_per_s_per_gpu: float
    model_tflops_per_s_per_gpu: float
    mfu: float | None
    """Model FLOP/s over the BF16 peak of the device; None where the peak is not known."""
    hardware_tflops_per_s_per_gpu: float = 0.0
    """Computed FLOP/s, including padding, blank images and recomputation."""
    hfu: float | None = None
    """Computed FLOP/s over the BF16 peak of the device."""
    peak_memory_bytes: int
    skipped: bool
    """Whether weights and optimizer state were left unchanged."""
    skip_reason: str = ""
    faulty_samples: int = 0
    """Samples of the step that could not be read, listed in quarantine.jsonl."""
    validation_loss: float | None = None
    fp8_loss_gap: float | None = None
    """Relative gap where the FP8 divergence check ran before this step (resilience/fp8_divergence.py)."""
    fp8_norm_gap: float | None = None
    consumed_by_source: dict[str, int] = field(default_factory=dict)
    """Samples of each data set of a blend; empty for a single one."""
    goodput_accounts: dict[str, float] = field(default_factory=dict)
    """Seconds by account since the previous line (goodput.py); in the file each account is a key of its own."""


class RunWriters:
    """The metrics files of a run directory, opened for the steps after `start_step`."""

    def __init__(
        self,
        directory: Path,
        *,
        start_step: int,
        total_steps: int,
        console_every: int,
        sample_keys: bool,
        tensorboard: bool,
        wandb: WandbWriter | None = None,
    ) -> None:
        self._total_steps, self._console_every = total_steps, console_every
        self._metrics = reopen(directory / METRICS, keep_to_step=start_step)
        self._samples = reopen(directory / "samples.jsonl", keep_to_step=start_step) if sample_keys else None
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1) if tensorboard else None
        self._wandb = wandb
        self._counters = HardwareCounters() if tensorboard or wandb is not None else None

    def write(self, record: StepRecord, *, keys: Sequence[str] | None = None) -> None:
        """Write one step to all outputs; `keys` are those of its samples."""
        values = asdict(record)
        accounts = values.pop("goodput_accounts")
        self._metrics.write(json.dumps(values | accounts) + "\n")
        self._metrics.flush()
        if self._samples is not None:
            self._samples.write(json.dumps({"step": record.step, "keys": list(keys or [])}) + "\n")
            self._samples.flush()
        del values["skip_reason"]
        values |= {f"consumed/{name}": count for name, count in values.pop("consumed_by_source").items()}
        scalars = {
            f"train/{name}": float(value) for name, value in values.items() if name != "step" and value is not None
        }
        scalars |= {f"goodput/{name}": accounts[name] for name in sorted(accounts.keys() - {"time"})}
        self._scalars(scalars | (self._counters.take() if self._counters is not None else {}), step=record.step)
        if record.step % self._console_every == 0 or record.step == self._total_steps:
            get_logger().info(self._format_line(record))

    def write_rank_timings(self, values: Mapping[str, float], *, step: int) -> None:
        """Write the comparison of ranks (resilience/straggler.py)."""
        self._scalars({f"ranks/{name}": value for name, value in values.items()}, step=step)

    def write_preview(self, preview: Preview, *, step: int) -> None:
        """Write the answers of a preview to the log and TensorBoard."""
        get_logger().info(
            "preview at step %d: %s (exact match %.2f over %d answers)",
            step,
            preview.answers[0],
            preview.exact_match,
            len(preview.answers),
        )
        if self._board is not None:
            self._board.add_image("preview/image", preview.pixels, step, dataformats="HWC")
            self._board.add_text(
                "preview/answer",
                "\n\n".join(
                    f"{answer} (record: {reference})" for answer, reference in zip(preview.answers, preview.references)
                ),
                step,
            )
            self._board.add_scalar("preview/exact_match", preview.exact_match, step)

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

    def _format_line(self, record: StepRecord) -> str:
        remaining = (self._total_steps - record.step) * record.step_time_s
        parts = [f"step {record.step}/{self._total_steps}", f"loss {record.loss:.4f}"]
        if record.validation_loss is not None:
            parts.append(f"validation {record.validation_loss:.4f}")
        parts += [
            f"grad {record.grad_norm:.3f}",
            f"lr {record.learning_rate:.2e}",
            f"{record.tokens_per_s_per_gpu:,.0f} tokens/s/rank",
            f"{record.step_time_s:.2f} s/step (data {record.data_wait_s:.2f})",
            f"ETA {_duration(remaining)}",
        ]
        if record.skipped:
            parts.append(f"SKIPPED: {record.skip_reason}")
        return " | ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def reopen(path: Path, *, keep_to_step: int) -> TextIO:
    """Open a file of lines by step for appending, after dropping the lines of later steps.

    A partial last line is dropped too, and with a warning any other line that is no record of a step.
    """
    kept = []
    for number, line in enumerate(split_lines(path), 1):
        record = parse_line(line)
        if record is None and line.endswith("\n"):
            get_logger().warning("%s:%d: %.80r is not the line of a step; left out", path, number, line.strip())
        if record is not None and record["step"] <= keep_to_step:
            kept.append(line)
    if path.exists():
        atomic_write_text(path, "".join(kept))
    return path.open("a", encoding="utf-8")

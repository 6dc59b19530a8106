"""The configuration of a training run: all sections of its YAML file, and the conflicts between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import field
from typing import Literal

from megatron_share4v.config.base import (
    Bool,
    Conflict,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
)
from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.overlap import overlap_conflicts
from megatron_share4v.config.parallel import ParallelConfig, layout_conflicts
from megatron_share4v.config.precision import PrecisionConfig, fp8_conflicts, length_multiple
from megatron_share4v.config.training import LossConfig, OptimConfig, ScheduleConfig, TrainConfig

WORKER_RESTART_S = 60
"""Seconds allowed for two restarts of a loader process."""

Ops = Literal["auto", "native", "reference"]
Attention = Literal["auto", "sdpa", "varlen", "math", "te"]


@config
class RunSection:
    """Run directory, seed and time limit."""

    directory: str
    """Directory for config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and log/; a second start resumes from it."""
    seed: Int = 42
    time_limit_minutes: PositiveFloat | None = None
    """Time from the start of the command by which the run is saved and ends with exit code 75. The time limit of Slurm
    applies in addition."""
    exit_at_step: PositiveInt | None = None
    """Save and end after this step, with exit code 0; the schedule stays that of all steps. A later start without it
    goes on. null: train all steps."""


@config
class CheckpointConfig:
    """When checkpoints are written, how many are kept, and the initial weights."""

    every_steps: NonNegativeInt = 0
    """0: only at the end."""
    every_minutes: NonNegativeFloat = 0.0
    """Save also when this much time has passed since the last save; 0: never."""
    in_background: Bool = False
    """Training waits only for a copy of the state to host memory, which takes its size in addition; it is written in
    the background. A save that comes before the last one is written waits for it."""
    before_time_limit_s: NonNegativeFloat = 120.0
    """With a time limit (run.time_limit_minutes, or Slurm's), the run is saved and ends this long before it, with
    reserve for one step and one save as long as the longest so far."""
    keep_last: PositiveInt = 2
    """Older checkpoints are removed after a newer one is complete."""
    keep_every_steps: NonNegativeInt = 0
    """Checkpoints at multiples of this are never removed; 0: none."""
    accept_changes: Bool = False
    """Resume although the configuration differs from the checkpoint's in what changes the mathematics (learning rates,
    schedule, loss, precision, steps). The difference is logged in either case."""
    allow_data_change: Bool = False
    """Resume although the data set, its order, the tokenizer, the template or the image policy differs from the
    checkpoint's; the difference is logged."""
    initialize_from: str | None = None
    """Checkpoint for the initial weights of this run (stage 2 from stage 1), written at any layout."""
    expect_tower: str | None = None
    """SHA-256 of the tower's weights that `initialize_from` must have, as printed by import, every save and
    `convert.py inspect`; null: any. OpenAI's CLIP and a tower tuned from it differ in nothing else."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find a malformed hash, or one without a checkpoint to check."""
        if self.expect_tower is not None and not re.fullmatch("[0-9a-f]{64}", self.expect_tower):
            message = f"expect_tower {self.expect_tower!r} is no SHA-256; write its 64 hexadecimal digits"
            yield Conflict(message, ("expect_tower",))
        if self.expect_tower is not None and self.initialize_from is None:
            message = "expect_tower is set and initialize_from is not, so there is no tower to check"
            yield Conflict(message, ("expect_tower", "initialize_from"))


@config
class ProfileConfig:
    """Steps that are recorded by the profiler, on every rank, into profile/ of the run directory; they are slower."""

    first_step: PositiveInt
    """1-based, as in metrics.jsonl; not step 1, which also warms up."""
    last_step: PositiveInt
    memory: Bool = False
    """Record allocations; on CUDA also a snapshot of the allocator."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find a range that ends before it starts."""
        if self.last_step < self.first_step:
            message = f"last_step {self.last_step} comes before first_step {self.first_step}"
            yield Conflict(message, ("first_step", "last_step"))


@config
class WatchConfig:
    """Step timeout of the heartbeat.

    After it all ranks write their stacks, a report in watch/ names the rank that differs, and the job ends with exit
    code 76, before torch's own timeout ends it without a reason."""

    step_s: PositiveFloat | None = None
    """Seconds; null: by `factor`."""
    factor: PositiveFloat | None = 20.0
    """Multiple of the median of the last steps, but at least the time that a hanging loader process may take; null: no
    step timeout."""


@config
class LogConfig:
    """Console, metrics and profiler output of training."""

    every_steps: PositiveInt = 1
    """Steps between console lines; metrics.jsonl and TensorBoard have every step."""
    sample_keys: Bool = False
    """Write samples.jsonl: the keys of each global batch in plan order."""
    tensorboard: Bool = True
    wandb: str | None = None
    """Log to Weights & Biases under this project name; needs the package wandb, whose environment variables select the
    destination (WANDB_MODE=offline: local files)."""
    profile: ProfileConfig | None = None
    """Record a trace of some steps with torch's profiler."""
    ranks_every_steps: NonNegativeInt = 50
    """Compare the compute and data-wait times of the ranks and log slow ranks; 0: never."""
    slow_rank_factor: PositiveFloat = 1.5
    """A rank is slow when it takes this multiple of the median of the other ranks of its pipeline stage."""


@config
class RunConfig:
    """Configuration of one training run."""

    run: RunSection
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    ops: Ops = "auto"
    """Fused kernels of csrc/. `native`: these or an error; `reference`: plain torch; `auto`: native when they can be
    built, else reference."""
    attention: Attention = "auto"
    """Attention kernel. `sdpa`: torch's scaled_dot_product_attention, sample by sample in packs. `varlen`: torch's
    kernel for packs, all samples at once (NVIDIA GPUs, bf16). `te`: Transformer Engine's (the same, with cuDNN).
    `math`: plain products, for comparison. `auto`: varlen for packs when available, else sdpa. All keep the samples of
    a pack apart."""
    transformer_engine: Literal["none", "language", "all"] = "none"
    """Matrix products of the decoder layers (`all`: and of the tower) by NVIDIA's Transformer Engine."""
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def loader_patience_s(self) -> float:
        """Longest delay of a step by a loader process that hangs twice, in seconds."""
        return 2 * self.data.worker_timeout_s + WORKER_RESTART_S if self.data.num_workers else 0

    def conflicts(self) -> Iterator[Conflict]:
        """Find conflicts between sections."""
        yield from layout_conflicts(self.model, self.parallel)
        if self.parallel.overlap_tensor:
            yield from overlap_conflicts(
                self.precision,
                engine=self.transformer_engine,
                pack_length=self.data.pack_length,
                preview=self.train.preview_every_steps,
            )
        tensor, engine = self.parallel.tensor, self.transformer_engine
        yield from fp8_conflicts(self.model, self.precision, tensor=tensor, engine=engine)
        yield from self._timeout_conflicts()
        yield from self._length_conflicts()

    def _timeout_conflicts(self) -> Iterator[Conflict]:
        """Find timeouts that end the job before a hanging loader process is given up."""
        hung_s, timeout_s, step_s = self.loader_patience_s, self.parallel.timeout_s, self.watch.step_s
        ends = "ends the job before a loader process that hangs twice is given up"
        if hung_s > timeout_s:
            limit = f"2 x data.worker_timeout_s + {WORKER_RESTART_S} = {hung_s} s"
            message = f"parallel.timeout_s {timeout_s} {ends}, after {limit}; raise the one or lower the other"
            yield Conflict(message, ("parallel.timeout_s", "data.worker_timeout_s"))
        if step_s is not None and hung_s > step_s:
            message = f"watch.step_s {step_s:g} {ends}, after {hung_s} s; raise it, or lower data.worker_timeout_s"
            yield Conflict(message, ("watch.step_s", "data.worker_timeout_s"))

    def _length_conflicts(self) -> Iterator[Conflict]:
        """Find sequence lengths that the precision, the layout or the model does not allow."""
        pack_length, multiple = self.data.pack_length, self.length_multiple(other=1)
        if pack_length and pack_length % multiple:
            fp8, tensor, sequence = self.precision.fp8, self.parallel.tensor, str(self.parallel.sequence).lower()
            message = (
                f"data.pack_length {pack_length} is not divisible by {multiple}, as precision.fp8 {fp8} with "
                f"parallel.tensor {tensor} and parallel.sequence {sequence} needs; "
                f"use {-(-pack_length // multiple) * multiple}"
            )
            yield Conflict(message, ("data.pack_length", "parallel.tensor", "precision.fp8"))
        longest = self.data.max_text_length + self.model.vision.num_features - 1
        limit = self.model.language.max_position_embeddings
        if longest > limit:
            message = (
                f"data.max_text_length {self.data.max_text_length} with one image takes {longest} positions; "
                f"model.language.max_position_embeddings is {limit}"
            )
            model_keys = ("language.max_position_embeddings", "vision.image_size", "vision.patch_size")
            yield Conflict(message, ("data.max_text_length", *(f"model.{key}" for key in model_keys)))

    def length_multiple(self, *, other: int | None = None) -> int:
        """Return the multiple that sequence lengths are rounded up to (config/precision.py).

        `other`: a multiple required for another reason; None: data.pad_multiple.
        """
        return length_multiple(
            self.precision,
            tensor=self.parallel.tensor,
            sequence=self.parallel.sequence,
            context=self.parallel.context,
            other=self.data.pad_multiple if other is None else other,
        )

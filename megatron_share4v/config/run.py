"""Everything that one training run is told: the sections of a run's YAML file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import field
from typing import Literal

from megatron_share4v.config.base import (
    Bool,
    Conflict,
    Fraction,
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
from megatron_share4v.config.precision import PrecisionConfig, fp8_conflicts, length_multiple

RESTART_S = 60
"""Accepted for starting a loader process again, twice."""


@config
class RunSection:
    """Where the run lives."""

    directory: str
    """config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and log/ are written here; a second start resumes from it."""
    seed: Int = 42
    time_limit_minutes: PositiveFloat | None = None
    """Counted from the start of the command: by then the run has been saved and has ended with exit code 75. Slurm's own limit counts without it."""


@config
class ParallelConfig:
    """Degrees of parallelism; data parallel is what the world size leaves."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: PositiveInt = 1
    """Ranks that share the positions of each sequence, for packs too long for one; between them attention shares heads, so that tensor x context divides those."""
    sequence: Bool = False
    """Sequence parallelism in the language model (needs tensor > 1)."""
    distributed_optimizer: Bool = True
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: Bool = False
    overlap_param_gather: Bool = False
    """Gather updated weights while the next forward pass already runs on those that have come (needs distributed_optimizer and overlap_grad_reduce)."""
    overlap_tensor: Bool = False
    """Tensor-parallel messages behind the products that wait for them, by Transformer Engine's user buffers (config/overlap.py). No GPU has run it yet."""
    layout: Literal["auto"] | tuple[PositiveInt, ...] = "auto"
    """Decoder layers on each of the pipeline x virtual stages, in the model's order. `auto`: so that the slowest pipeline rank is fastest, counting the
    tower and the projector on the first stage and the head on the last, by what of them trains."""
    timeout_s: PositiveInt = 600
    """A collective that waits longer than this ends the job."""
    check_replicas_every_steps: NonNegativeInt = 100
    """Compare the weights of all data-parallel replicas, also before each save; one that differs ends the job with exit code 77. 0: never."""

    def conflicts(self) -> Iterator[Conflict]:
        """Degrees that need another one, or that are not available."""
        if self.sequence and self.tensor == 1:
            yield Conflict("sequence true needs tensor > 1, got tensor 1", ("sequence", "tensor"))
        if self.virtual > 1 and self.pipeline == 1:
            yield Conflict(f"virtual {self.virtual} needs pipeline > 1, got pipeline 1", ("virtual", "pipeline"))
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            needs = ("overlap_param_gather", "distributed_optimizer", "overlap_grad_reduce")
            yield Conflict(
                "overlap_param_gather true needs distributed_optimizer true and overlap_grad_reduce true", needs
            )
        if self.overlap_tensor and not self.sequence:
            message = (
                f"overlap_tensor true needs tensor > 1 and sequence true, got tensor {self.tensor} and sequence false"
            )
            yield Conflict(message, ("overlap_tensor", "tensor", "sequence"))
        if self.layout != "auto" and len(self.layout) != self.pipeline * self.virtual:
            message = f"layout {list(self.layout)} names {len(self.layout)} stages; pipeline {self.pipeline} x virtual {self.virtual} has {self.pipeline * self.virtual}"
            yield Conflict(message, ("layout", "pipeline", "virtual"))


@config
class OptimConfig:
    """AdamW."""

    learning_rate: PositiveFloat = 2e-5
    projector_learning_rate: PositiveFloat | None = None
    vision_learning_rate: PositiveFloat | None = None
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Applied to matrices only, not to biases and norms."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Global L2 norm; 0: off."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """In which AdamW keeps its two averages. bf16 halves them; the squares are rounded stochastically, so that slow ones do not stand still."""
    offload: Bool = False
    """Keep the averages in pinned host memory; each is brought to the GPU for its update and taken back. Saves 8 bytes per parameter there (4 in bf16)."""


@config
class ScheduleConfig:
    """Learning rate over the steps, as a factor of each component's own rate."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    """Share of all steps, rounded up."""
    warmup_steps: NonNegativeInt | None = None
    """Overrides warmup_ratio."""
    final_ratio: Fraction = 0.0
    """Factor at the last step of cosine and linear."""


@config
class LossConfig:
    """How token losses become one number."""

    normalize: Literal["tokens", "microbatch"] = "tokens"
    """`tokens`: sum over the step / trained tokens of the step. `microbatch`: mean of micro-batch means, as LLaVA averages."""


Recompute = Literal["none", "full", "selective"]


@config
class BadStepConfig:
    """Steps whose loss or gradient is not finite, or far above the usual one: weights and optimizer are left alone, on all ranks alike, and
    bad_steps/step_<N>/ in the run directory tells which samples, micro-batches and modules it was."""

    loss_factor: PositiveFloat | None = None
    """A loss above so many times the median of the last good steps is bad; null: only one that is not finite is."""
    gradient_factor: PositiveFloat | None = None
    """The same for the gradient norm before clipping."""
    window: PositiveInt = 64
    """Good steps of which the median is taken; a quarter of them must have been made before anything is compared with it."""
    samples: NonNegativeInt = 16
    """Samples of the worst micro-batches that are written out, with their images."""
    in_a_row: NonNegativeInt = 50
    """So many one after another are too many; 0: any number is accepted."""
    then: Literal["stop", "roll_back"] = "stop"
    """What follows. `roll_back`: to the newest checkpoint of before, with all steps since passed over."""

    def conflicts(self) -> Iterator[Conflict]:
        """Factors that make every other step bad."""
        for name in ("loss_factor", "gradient_factor"):
            factor = getattr(self, name)
            if factor is not None and factor <= 1.0:
                yield Conflict(f"{name} {factor:g} calls half of all steps bad; use more than 1, or null", (name,))


@config
class TrainConfig:
    """How much is trained, and how often it is checked."""

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1
    steps: PositiveInt | None = None
    """None: what `epochs` asks for."""
    epochs: PositiveFloat = 1.0
    validate_every_steps: NonNegativeInt = 0
    """0: never."""
    validation_batches: PositiveInt = 4
    """Global batches per validation, always the first ones of the validation set."""
    preview_every_steps: NonNegativeInt = 0
    """Write held-out images with the model's own answers to TensorBoard; 0: never."""
    preview_samples: PositiveInt = 1
    """Of the validation set, always the first ones; their share of answers that are the records' is a curve."""
    preview_tokens: PositiveInt = 64
    recompute: Recompute = "none"
    """Activations of the language model that are computed again in the backward pass instead of kept. `full`: all of a layer but its input;
    `selective`: those inside `recompute_modules`."""
    recompute_layers: PositiveInt | None = None
    """With `recompute: full`: layers of each pipeline stage that do so, from the first on; null: all."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)
    """With `selective`. `layernorm` needs Transformer Engine, without which megatron-core cannot free the output of a norm."""
    recompute_tower: Recompute = "none"
    """The same for the trained blocks of the vision tower; the frozen ones before them keep nothing anyway."""
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)

    def conflicts(self) -> Iterator[Conflict]:
        """A global batch that micro-batches do not fill, and a choice of what to recompute that means nothing."""
        if self.recompute_layers is not None and self.recompute != "full":
            message = f"recompute_layers {self.recompute_layers} counts whole layers and needs recompute full, got recompute {self.recompute}"
            yield Conflict(message, ("recompute_layers", "recompute"))
        if "selective" in (self.recompute, self.recompute_tower) and not self.recompute_modules:
            yield Conflict(
                "recompute selective of no module; name some in recompute_modules, or use none",
                ("recompute_modules", "recompute"),
            )
        if self.global_batch_size % self.micro_batch_size:
            message = f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            yield Conflict(message, ("global_batch_size", "micro_batch_size"))

    def total_steps(self, num_items: int) -> int:
        """Steps of the whole run over epochs of `num_items` samples (or packs); the last batch of an epoch is never dropped."""
        return self.steps or max(1, math.ceil(num_items * self.epochs / self.global_batch_size))


@config
class CheckpointConfig:
    """When state is written, and what the run starts from."""

    every_steps: NonNegativeInt = 0
    """0: only at the end."""
    every_minutes: NonNegativeFloat = 0.0
    """Also when so much time has passed since the last save; 0: never."""
    in_background: Bool = False
    """Training waits only until what is to be written is copied to the host's memory, which takes as much of it again. It is written meanwhile; a save
    that comes before the last one is written waits for it."""
    before_time_limit_s: NonNegativeFloat = 120.0
    """Where the job has a time limit (run.time_limit_minutes, or Slurm's), the run is saved and ends so long before it; one step and one save, as long
    as the longest so far, are left beside."""
    keep_last: PositiveInt = 2
    """Older checkpoints are removed after a newer one is whole."""
    keep_every_steps: NonNegativeInt = 0
    """Checkpoints at multiples of this are never removed; 0: none."""
    accept_changes: Bool = False
    """Resume although the configuration differs from the checkpoint's in what changes the mathematics (rates, schedule, loss, precision, steps). The
    difference is shown in either case."""
    allow_data_change: Bool = False
    """Resume although the data set, its order, the tokenizer, the template or the image policy is not the checkpoint's; the log says what is not."""
    initialize_from: str | None = None
    """A checkpoint whose weights alone start this run (stage 2 from stage 1), at any layout."""
    expect_tower: str | None = None
    """SHA-256 of the tower's weights that `initialize_from` must have, as import, every save and `convert.py inspect` print it; null: any. OpenAI's
    CLIP and a tower tuned from it differ in nothing else."""

    def conflicts(self) -> Iterator[Conflict]:
        """A hash that is none, or of nothing."""
        if self.expect_tower is not None and not re.fullmatch("[0-9a-f]{64}", self.expect_tower):
            yield Conflict(
                f"expect_tower {self.expect_tower!r} is no SHA-256; write its 64 hexadecimal digits", ("expect_tower",)
            )
        if self.expect_tower is not None and self.initialize_from is None:
            yield Conflict(
                "expect_tower is set and initialize_from is not, so there is no tower to check",
                ("expect_tower", "initialize_from"),
            )


@config
class ProfileConfig:
    """Steps whose work is recorded, on every rank, into profile/ of the run directory. Recording slows them down."""

    first_step: PositiveInt
    """Counted from 1, as in metrics.jsonl; not the very first, which also warms up."""
    last_step: PositiveInt
    memory: Bool = False
    """Allocations too; on CUDA also a snapshot of the allocator."""

    def conflicts(self) -> Iterator[Conflict]:
        """A range that ends before it begins."""
        if self.last_step < self.first_step:
            yield Conflict(
                f"last_step {self.last_step} comes before first_step {self.first_step}", ("first_step", "last_step")
            )


@config
class WatchConfig:
    """When a step takes too long. All ranks then write their stacks, a report in watch/ names the rank that differs, and the job ends with exit
    code 76 before torch's own time-out would end it without a reason."""

    step_s: PositiveFloat | None = None
    """Seconds; null: what `factor` says."""
    factor: PositiveFloat | None = 20.0
    """So many times the median of the last steps, and at least as long as a loader process that hangs is given; null: no step is too long."""


@config
class LogConfig:
    """What is written while training."""

    every_steps: PositiveInt = 1
    """Console lines; metrics.jsonl and TensorBoard have every step."""
    sample_keys: Bool = False
    """Write samples.jsonl: the keys of each global batch in plan order."""
    tensorboard: Bool = True
    wandb: str | None = None
    """Weights & Biases too, under a project of this name; needs the package wandb. Its own variables say where to (WANDB_MODE=offline: nowhere)."""
    profile: ProfileConfig | None = None
    """Record a trace of some steps with torch's profiler."""
    ranks_every_steps: NonNegativeInt = 50
    """Compare how long the ranks compute and wait for data, and name the slow ones; 0: never."""
    slow_rank_factor: PositiveFloat = 1.5
    """A rank is slow that takes so many times the median of the others of its pipeline stage."""


Ops = Literal["auto", "native", "reference"]
Attention = Literal["auto", "sdpa", "varlen", "math", "te"]


@config
class RunConfig:
    """One training run."""

    run: RunSection
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    ops: Ops = "auto"
    """Fused kernels of csrc/. `native`: these or an error; `reference`: plain torch; `auto`: native where they can be built, else reference."""
    attention: Attention = "auto"
    """Kernel of the attention. `sdpa`: torch's scaled_dot_product_attention, sample by sample in packs. `varlen`: torch's for packs, all samples at
    once (NVIDIA GPUs, bf16). `te`: Transformer Engine's (the same, with cuDNN). `math`: plain products, to compare with. `auto`: varlen for packs where it can be had,
    else sdpa. All keep the samples of a pack apart."""
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
        """How long a loader process that hangs twice holds up a step."""
        return 2 * self.data.worker_timeout_s + RESTART_S if self.data.num_workers else 0

    def conflicts(self) -> Iterator[Conflict]:
        """A model that the layout cannot cut, and samples that the model cannot hold."""
        yield from _layout_conflicts(self.model, self.parallel)
        if self.parallel.overlap_tensor:
            yield from overlap_conflicts(
                self.precision,
                engine=self.transformer_engine,
                pack_length=self.data.pack_length,
                preview=self.train.preview_every_steps,
            )
        yield from fp8_conflicts(
            self.model, self.precision, tensor=self.parallel.tensor, engine=self.transformer_engine
        )
        pack_length, multiple = self.data.pack_length, self.length_multiple(other=1)
        if pack_length and pack_length % multiple:
            message = (
                f"data.pack_length {pack_length} is not divisible by {multiple}, as precision.fp8 {self.precision.fp8} with parallel.tensor "
                f"{self.parallel.tensor} and parallel.sequence {str(self.parallel.sequence).lower()} needs; use {-(-pack_length // multiple) * multiple}"
            )
            yield Conflict(message, ("data.pack_length", "parallel.tensor", "precision.fp8"))
        hung, timeout_s = self.loader_patience_s, self.parallel.timeout_s
        if hung > timeout_s:
            yield Conflict(
                f"parallel.timeout_s {timeout_s} ends the job before a loader process that hangs twice is given up, after 2 x data.worker_timeout_s + "
                f"{RESTART_S} = {hung} s; raise the one or lower the other",
                ("parallel.timeout_s", "data.worker_timeout_s"),
            )
        if self.watch.step_s is not None and hung > self.watch.step_s:
            yield Conflict(
                f"watch.step_s {self.watch.step_s:g} ends the job before a loader process that hangs twice is given up, after {hung} s; raise it, or "
                "lower data.worker_timeout_s",
                ("watch.step_s", "data.worker_timeout_s"),
            )
        longest, limit = (
            self.data.max_text_length + self.model.vision.num_patches - 1,
            self.model.language.max_position_embeddings,
        )
        if longest > limit:
            yield Conflict(
                f"data.max_text_length {self.data.max_text_length} with one image takes {longest} positions; "
                f"model.language.max_position_embeddings is {limit}",
                (
                    "data.max_text_length",
                    "model.language.max_position_embeddings",
                    "model.vision.image_size",
                    "model.vision.patch_size",
                ),
            )

    def length_multiple(self, *, other: int | None = None) -> int:
        """Lengths of sequences are rounded up to this (config/precision.py); `other`: None: data.pad_multiple."""
        parallel = self.parallel
        other = self.data.pad_multiple if other is None else other
        return length_multiple(
            self.precision, tensor=parallel.tensor, sequence=parallel.sequence, context=parallel.context, other=other
        )


def _layout_conflicts(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Conflict]:
    tensor = parallel.tensor
    language, vision = model.language, model.vision
    cut = {
        "model.language.num_attention_heads": language.num_attention_heads,
        "model.language.intermediate_size": language.intermediate_size,
        "model.language.padded_vocab_size": language.padded_vocab_size,
        "model.vision.num_attention_heads": vision.num_attention_heads,
        "model.vision.intermediate_size": vision.intermediate_size,
    }
    for name, size in cut.items():
        if size % tensor:
            yield Conflict(f"{name} {size} is not divisible by parallel.tensor {tensor}", ("parallel.tensor", name))
    groups = language.num_key_value_heads
    if groups % tensor and tensor % groups:
        message = f"model.language.num_key_value_heads {groups} and parallel.tensor {tensor} do not divide each other"
        yield Conflict(message, ("parallel.tensor", "model.language.num_key_value_heads"))
    heads = language.num_attention_heads
    if parallel.context > 1 and heads % (tensor * parallel.context):
        message = f"model.language.num_attention_heads {heads} is not divisible by parallel.tensor {tensor} x parallel.context {parallel.context}"
        yield Conflict(message, ("parallel.tensor", "parallel.context", "model.language.num_attention_heads"))
    own = max(groups // tensor, 1)
    if heads % (tensor * parallel.context) == 0 and own % parallel.context and parallel.context % own:
        message = f"the {own} model.language.num_key_value_heads of a tensor rank and parallel.context {parallel.context} do not divide each other"
        yield Conflict(message, ("parallel.tensor", "parallel.context", "model.language.num_key_value_heads"))
    if parallel.layout != "auto" and sum(parallel.layout) != language.num_layers:
        message = f"parallel.layout {list(parallel.layout)} adds up to {sum(parallel.layout)} layers; model.language.num_layers is {language.num_layers}"
        yield Conflict(message, ("parallel.layout", "model.language.num_layers"))
    stages = parallel.pipeline * parallel.virtual
    if stages > language.num_layers:
        message = (
            f"parallel.pipeline x parallel.virtual {stages} exceeds model.language.num_layers {language.num_layers}"
        )
        yield Conflict(message, ("parallel.pipeline", "parallel.virtual", "model.language.num_layers"))

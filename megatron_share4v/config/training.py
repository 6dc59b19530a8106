"""Sections of a run's YAML file about training itself: optimizer, schedule, loss, steps, and bad steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import field
from typing import Literal

from megatron_share4v.config.base import (
    Bool,
    Conflict,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
)

Recompute = Literal["none", "full", "selective"]


@config
class OptimConfig:
    """AdamW and its learning rates."""

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
    """Dtype of AdamW's two moments. bf16 halves their memory; the second is rounded stochastically, so that small
    updates are not lost."""
    offload: Bool = False
    """Keep the moments in pinned host memory and copy each to the GPU for its update. Saves 8 bytes of GPU memory per
    parameter (4 in bf16)."""


@config
class ScheduleConfig:
    """Learning rate over the steps, as a factor of each component's own rate."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    """Fraction of all steps, rounded up."""
    warmup_steps: NonNegativeInt | None = None
    """Overrides warmup_ratio."""
    final_ratio: Fraction = 0.0
    """Factor at the last step of cosine and linear."""


@config
class LossConfig:
    """Normalization of the loss."""

    normalize: Literal["tokens", "microbatch"] = "tokens"
    """`tokens`: sum over the step / trained tokens of the step. `microbatch`: mean of micro-batch means, as LLaVA."""


@config
class BadStepConfig:
    """Detection of bad steps: loss or gradient not finite, or far above the usual value.

    A bad step makes no update on any rank, and bad_steps/step_<N>/ in the run directory names its samples,
    micro-batches and modules."""

    loss_factor: PositiveFloat | None = None
    """A loss above this multiple of the median of the last good steps is bad; null: only one that is not finite."""
    gradient_factor: PositiveFloat | None = None
    """The same for the gradient norm before clipping."""
    window: PositiveInt = 64
    """Number of good steps for the median; comparison starts once a quarter of them is trained."""
    samples: NonNegativeInt = 16
    """Samples of the worst micro-batches that are written out, with their images."""
    in_a_row: NonNegativeInt = 50
    """Number of consecutive bad steps after which `then` applies; 0: never."""
    then: Literal["stop", "roll_back"] = "stop"
    """`stop` ends the run; `roll_back` returns to the newest checkpoint before them and skips all steps since."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find factors that would classify every other step as bad."""
        for name in ("loss_factor", "gradient_factor"):
            factor = getattr(self, name)
            if factor is not None and factor <= 1.0:
                yield Conflict(f"{name} {factor:g} calls half of all steps bad; use more than 1, or null", (name,))


@config
class TrainConfig:
    """Batch sizes, number of steps, validation, and activation recomputation."""

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1
    steps: PositiveInt | None = None
    """null: as many as `epochs` take."""
    epochs: PositiveFloat = 1.0
    validate_every_steps: NonNegativeInt = 0
    """0: never."""
    validation_batches: PositiveInt = 4
    """Global batches per validation, always the first ones of the validation set."""
    preview_every_steps: NonNegativeInt = 0
    """Write held-out images with generated answers to TensorBoard; 0: never."""
    preview_samples: PositiveInt = 1
    """Samples per preview, always the first ones of the validation set; exact match is logged as a curve."""
    preview_tokens: PositiveInt = 64
    recompute: Recompute = "none"
    """Activations of the language model that are recomputed in the backward pass instead of stored. `full`: all of a
    layer but its input; `selective`: those inside `recompute_modules`."""
    recompute_layers: PositiveInt | None = None
    """With `recompute: full`: number of layers of each pipeline stage, from the first on; null: all."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)
    """With `selective`. `layernorm` needs Transformer Engine: without it megatron-core keeps the output of a norm."""
    recompute_tower: Recompute = "none"
    """The same for the trained blocks of the vision tower; frozen blocks before them store no activations."""
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)

    def conflicts(self) -> Iterator[Conflict]:
        """Find a global batch that is not a multiple of the micro-batch, and recompute settings without effect."""
        if self.recompute_layers is not None and self.recompute != "full":
            needs = f"needs recompute full, got recompute {self.recompute}"
            message = f"recompute_layers {self.recompute_layers} counts whole layers and {needs}"
            yield Conflict(message, ("recompute_layers", "recompute"))
        if "selective" in (self.recompute, self.recompute_tower) and not self.recompute_modules:
            message = "recompute selective of no module; name some in recompute_modules, or use none"
            yield Conflict(message, ("recompute_modules", "recompute"))
        if self.global_batch_size % self.micro_batch_size:
            size = f"global_batch_size {self.global_batch_size}"
            message = f"{size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            yield Conflict(message, ("global_batch_size", "micro_batch_size"))

    def total_steps(self, num_items: int) -> int:
        """Return the steps over epochs of `num_items` samples (or packs); the last batch is never dropped."""
        return self.steps or max(1, math.ceil(num_items * self.epochs / self.global_batch_size))

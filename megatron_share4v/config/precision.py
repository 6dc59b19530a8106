"""The precision section: dtypes, FP8 recipes and their size constraints, and the FP8 divergence guard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from megatron_share4v.config.base import Bool, Conflict, NonNegativeInt, PositiveFloat, config
from megatron_share4v.config.model import ModelConfig

Recipe = Literal["none", "tensorwise", "delayed", "blockwise", "mxfp8"]
ROWS: dict[Recipe, int] = {"none": 1, "tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""Multiple of the number of positions per rank by recipe; Transformer Engine refuses others, the project's own layer
would pad with zeros."""
WIDTH = 16
"""Multiple of the widths of matrices in FP8 products."""


@config
class PrecisionConfig:
    """Dtypes of weights, activations and gradients; the optimizer always keeps fp32 weights."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Dtype of gradient accumulation over micro-batches and data-parallel ranks. bf16 halves buffers and traffic, and
    sums are less precise."""
    fp8: Recipe = "none"
    """FP8 recipe for the matrix products of the decoder layers. `tensorwise`: one scale per tensor, computed at each
    use, by this project or by Transformer Engine when `transformer_engine` is on; the other recipes need it. Embedding,
    head, projector and (without fp8_tower) the tower stay in `dtype`."""
    fp8_first_layers: NonNegativeInt = 0
    """Number of first decoder layers that stay in `dtype`."""
    fp8_last_layers: NonNegativeInt = 0
    """Number of last decoder layers that stay in `dtype`."""
    fp8_tower: Bool = False
    """Matrix products of the vision tower in FP8 too."""
    fp8_weight_gradient: Literal["fp8", "dtype"] = "fp8"
    """`dtype`: weight gradients by products in `dtype`, which stores inputs in it (twice the memory)."""
    fp8_param_gather: Bool = False
    """Not available; true is refused with the reason."""
    guard_every_steps: NonNegativeInt = 0
    """With fp8: interval at which one micro-batch of each data-parallel rank also runs in `dtype`, and the differences
    of loss and gradient norm are logged; 0: never."""
    guard_loss_gap: PositiveFloat = 0.02
    """Largest relative difference of the loss; a larger one ends the run."""
    guard_norm_gap: PositiveFloat = 0.2
    """Largest relative difference of the gradient norm; a larger one ends the run."""

    def fp8_layers(self, layers: int) -> range:
        """Return the 0-based range of decoder layers in FP8, of `layers` in all."""
        return range(self.fp8_first_layers, layers - self.fp8_last_layers) if self.fp8 != "none" else range(0)

    def conflicts(self) -> Iterator[Conflict]:
        """Find gradients of lower precision than their weights, and FP8 settings without FP8."""
        if self.gradients == "bf16" and self.dtype == "fp32":
            yield Conflict("gradients bf16 needs dtype bf16, got dtype fp32", ("gradients", "dtype"))
        if self.fp8 == "none":
            for name in ("fp8_first_layers", "fp8_last_layers", "fp8_tower", "guard_every_steps"):
                if getattr(self, name):
                    yield Conflict(
                        f"{name} {getattr(self, name)} needs fp8, which is none; use tensorwise, or leave {name} out",
                        (name, "fp8"),
                    )
        if self.fp8_param_gather:
            message = (
                "fp8_param_gather true is not available: megatron-core has it only for weights that are Transformer "
                "Engine's FP8 tensors from their construction on, which first weights, checkpoints, the comparison of "
                "replicas and the guard's pass in bf16 here cannot read; use false, and parallel.overlap_param_gather "
                "to hide the gather"
            )
            yield Conflict(message, ("fp8_param_gather",))
        if self.fp8 == "delayed" and (self.fp8_first_layers or self.fp8_last_layers):
            message = (
                "fp8 delayed keeps its scales over the whole model and cannot leave out fp8_first_layers or "
                "fp8_last_layers; use tensorwise"
            )
            yield Conflict(message, ("fp8", "fp8_first_layers", "fp8_last_layers"))


def length_multiple(precision: PrecisionConfig, *, tensor: int, sequence: bool, context: int, other: int = 1) -> int:
    """Return the multiple that the lengths of sequences and packs must have.

    The part of a sequence on each rank must be a multiple of the recipe's rows: sequence parallelism splits it into
    `tensor` parts, context parallelism into `context`. `other`: a multiple required for another reason.
    """
    parts = (tensor if sequence else 1) * context
    return math.lcm(ROWS[precision.fp8] * parts, other)


def fp8_conflicts(model: ModelConfig, precision: PrecisionConfig, *, tensor: int, engine: str) -> Iterator[Conflict]:
    """Find recipes that need Transformer Engine, and layer counts and widths that FP8 does not support."""
    if precision.fp8 == "none":
        return
    if engine == "none" and precision.fp8 != "tensorwise":
        recipe = f"precision.fp8 {precision.fp8}"
        message = f"{recipe} is Transformer Engine's; set transformer_engine: language, or use tensorwise"
        yield Conflict(message, ("precision.fp8", "transformer_engine"))
    if engine != "none" and precision.dtype == "fp32":
        yield Conflict(
            "precision.fp8 by Transformer Engine needs precision.dtype bf16, got fp32",
            ("precision.dtype", "transformer_engine"),
        )
    if engine != "none" and precision.fp8_tower:
        rows = model.vision.num_positions
        if rows % 8:
            message = (
                f"precision.fp8_tower: an image has {rows} positions, and Transformer Engine's FP8 needs multiples of "
                "8; keep the tower in bf16"
            )
            yield Conflict(message, ("precision.fp8_tower", "transformer_engine"))
    if precision.fp8_first_layers + precision.fp8_last_layers >= model.language.num_layers:
        layers = f"model.language.num_layers {model.language.num_layers}"
        message = f"precision.fp8_first_layers and fp8_last_layers leave none of {layers} in FP8"
        yield Conflict(
            message, ("precision.fp8_first_layers", "precision.fp8_last_layers", "model.language.num_layers")
        )
    language = model.language
    head = language.attention_head_dim
    groups = max(language.num_key_value_heads, tensor)  # fewer groups than ranks are repeated
    widths = {
        "model.language.hidden_size": language.hidden_size,
        "model.language.num_attention_heads": (language.num_attention_heads + 2 * groups) * head // tensor,
        "model.language.intermediate_size": language.intermediate_size // tensor,
    }
    widths["model.language.num_attention_heads "] = language.query_width // tensor
    if precision.fp8_tower:
        widths |= {
            "model.vision.hidden_size": model.vision.hidden_size // tensor,
            "model.vision.intermediate_size": model.vision.intermediate_size // tensor,
        }
    for name, width in widths.items():
        if width % WIDTH:
            message = (
                f"precision.fp8 needs matrices of widths in multiples of {WIDTH}; {name.strip()} gives {width} on each "
                f"of parallel.tensor {tensor} ranks"
            )
            yield Conflict(message, (name.strip(), "parallel.tensor", "precision.fp8"))

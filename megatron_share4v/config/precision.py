"""Arithmetic of a run: element types, FP8 recipes and what they ask of sizes, and the guard that watches FP8."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from megatron_share4v.config.base import Bool, Conflict, NonNegativeInt, PositiveFloat, config
from megatron_share4v.config.model import ModelConfig

Recipe = Literal["none", "tensorwise", "delayed", "blockwise", "mxfp8"]
ROWS: dict[Recipe, int] = {"none": 1, "tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What the number of positions that a rank multiplies must be a multiple of; Transformer Engine refuses others, our own layer would add zeros."""
WIDTH = 16
"""The same for the widths of matrices."""


@config
class PrecisionConfig:
    """Arithmetic of weights and activations; the optimizer keeps fp32 weights in any case."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    gradients: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are added up over micro-batches and data-parallel ranks. bf16 halves the buffers and what is sent; sums lose bits."""
    fp8: Recipe = "none"
    """Matrix products of the decoder layers in FP8. `tensorwise`: one scale per tensor, found anew each time; ours, or Transformer Engine's where
    `transformer_engine` is on, which the other recipes need. Embedding, head, projector and (but for fp8_tower) the tower stay in `dtype`."""
    fp8_first_layers: NonNegativeInt = 0
    """Decoder layers from the first on that stay in `dtype`."""
    fp8_last_layers: NonNegativeInt = 0
    """And those up to the last."""
    fp8_tower: Bool = False
    """Matrix products of the vision tower in FP8 too."""
    fp8_weight_gradient: Literal["fp8", "dtype"] = "fp8"
    """`dtype`: gradients of weights by products in `dtype`, which keeps inputs in it (twice the memory)."""
    fp8_param_gather: Bool = False
    """Not available; see its refusal."""
    guard_every_steps: NonNegativeInt = 0
    """With fp8: so often one micro-batch of each data-parallel rank is also run in `dtype`, and the gaps of loss and gradient norm are logged; 0: never."""
    guard_loss_gap: PositiveFloat = 0.02
    """Relative; a larger one ends the run."""
    guard_norm_gap: PositiveFloat = 0.2
    """Relative, of the gradient norm; a larger one ends the run."""

    def fp8_layers(self, layers: int) -> range:
        """Those in FP8 of so many decoder layers, counted from 0."""
        return range(self.fp8_first_layers, layers - self.fp8_last_layers) if self.fp8 != "none" else range(0)

    def conflicts(self) -> Iterator[Conflict]:
        """Gradients that are shorter than what they are gradients of, and FP8 settings without FP8."""
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
                "fp8_param_gather true is not available: megatron-core has it only for weights that are Transformer Engine's FP8 tensors from their "
                "construction on, which first weights, checkpoints, the comparison of replicas and the guard's pass in bf16 here cannot read; "
                "use false, and parallel.overlap_param_gather to hide the gather"
            )
            yield Conflict(message, ("fp8_param_gather",))
        if self.fp8 == "delayed" and (self.fp8_first_layers or self.fp8_last_layers):
            message = "fp8 delayed keeps its scales over the whole model and cannot leave out fp8_first_layers or fp8_last_layers; use tensorwise"
            yield Conflict(message, ("fp8", "fp8_first_layers", "fp8_last_layers"))


def length_multiple(precision: PrecisionConfig, *, tensor: int, sequence: bool, context: int, other: int = 1) -> int:
    """The one rule for lengths of sequences and packs: what a rank holds of a sequence is a multiple of the recipe's rows. Sequence parallelism cuts
    it into `tensor` parts, context parallelism into `context`. `other`: a multiple wanted for another reason."""
    parts = (tensor if sequence else 1) * context
    return math.lcm(ROWS[precision.fp8] * parts, other)


def fp8_conflicts(model: ModelConfig, precision: PrecisionConfig, *, tensor: int, engine: str) -> Iterator[Conflict]:
    """Recipes that our own layer does not have, and widths that FP8 products cannot have."""
    if precision.fp8 == "none":
        return
    if engine == "none" and precision.fp8 != "tensorwise":
        message = f"precision.fp8 {precision.fp8} is Transformer Engine's; set transformer_engine: language, or use tensorwise"
        yield Conflict(message, ("precision.fp8", "transformer_engine"))
    if engine != "none" and precision.dtype == "fp32":
        yield Conflict(
            "precision.fp8 by Transformer Engine needs precision.dtype bf16, got fp32",
            ("precision.dtype", "transformer_engine"),
        )
    if engine != "none" and precision.fp8_tower:
        rows = model.vision.num_patches + 1
        message = f"precision.fp8_tower: an image has {rows} positions, and Transformer Engine's FP8 needs multiples of 8; keep the tower in bf16"
        yield Conflict(message, ("precision.fp8_tower", "transformer_engine"))
    if precision.fp8_first_layers + precision.fp8_last_layers >= model.language.num_layers:
        message = f"precision.fp8_first_layers and fp8_last_layers leave none of model.language.num_layers {model.language.num_layers} in FP8"
        yield Conflict(
            message, ("precision.fp8_first_layers", "precision.fp8_last_layers", "model.language.num_layers")
        )
    language = model.language
    head = language.hidden_size // language.num_attention_heads
    groups = max(language.num_key_value_heads, tensor)  # fewer groups than ranks are repeated
    widths = {
        "model.language.hidden_size": language.hidden_size,
        "model.language.num_attention_heads": (language.num_attention_heads + 2 * groups) * head // tensor,
        "model.language.intermediate_size": language.intermediate_size // tensor,
    }
    widths["model.language.num_attention_heads "] = language.num_attention_heads * head // tensor
    if precision.fp8_tower:
        widths |= {
            "model.vision.hidden_size": model.vision.hidden_size // tensor,
            "model.vision.intermediate_size": model.vision.intermediate_size // tensor,
        }
    for name, width in widths.items():
        if width % WIDTH:
            message = f"precision.fp8 needs matrices of widths in multiples of {WIDTH}; {name.strip()} gives {width} on each of parallel.tensor {tensor} ranks"
            yield Conflict(message, (name.strip(), "parallel.tensor", "precision.fp8"))

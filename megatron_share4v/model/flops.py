"""FLOPs of a step in closed form: of the model (MFU) and of the hardware (HFU).

Training logs and the planner use the same.

A multiply-add is two FLOPs. Only matrix products count, as in torch.utils.flop_counter, and causal attention as half of
its square. A frozen matrix has no weight gradient, and no input gradient where nothing before it trains; a frozen
prefix of the tower is a forward pass only.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.config.training import Recompute


@dataclass(frozen=True)
class Flops:
    """FLOPs of one part of the model.

    Attention's products (scores, weighted values) are separate: they run at another speed.
    """

    forward: float = 0.0
    backward: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs of both passes."""
        return self.forward + self.backward + self.attention_forward + self.attention_backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(own + added for own, added in zip(self._values, other._values)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(value * factor for value in self._values))

    @property
    def _values(self) -> tuple[float, ...]:
        return self.forward, self.backward, self.attention_forward, self.attention_backward


@dataclass(frozen=True, kw_only=True)
class WorkloadCounts:
    """Sizes of the data of one step."""

    positions: float
    squares: float
    """Sum of the squared sequence lengths that attention sees: of each sample, not of a pack."""
    images: float
    head_rows: float
    """Positions with a label: only these reach the head."""


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Computation beyond the model's FLOPs, for WorkloadCounts that include padding."""

    fused_head: bool = True
    """Whether the backward pass of ops/linear_cross_entropy.py recomputes the logits."""
    flash: bool = True
    """Whether the backward pass of attention recomputes the scores."""
    recompute: Recompute = "none"
    """Activation recomputation of decoder layers."""
    recompute_share: float = 1.0
    """Fraction of the layers that `full` recomputes."""
    recompute_tower: Recompute = "none"
    recompute_modules: tuple[str, ...] = ()
    """Modules that `selective` recomputes, in decoder and tower."""

    @classmethod
    def of(cls, config: RunConfig, *, layers_per_stage: tuple[int, ...], fused_head: bool = True) -> ExecutionOptions:
        """Execution options of a run's configuration."""
        train, layers = config.train, config.train.recompute_layers
        recomputed = sum(count if layers is None else min(layers, count) for count in layers_per_stage)
        return cls(
            fused_head=fused_head,
            recompute=train.recompute,
            recompute_share=recomputed / sum(layers_per_stage),
            recompute_tower=train.recompute_tower,
            recompute_modules=train.recompute_modules,
        )


@dataclass(frozen=True)
class FlopsByPart:
    """FLOPs by part of the model; `layer` is one decoder layer."""

    tower: Flops
    projector: Flops
    layer: Flops
    head: Flops

    def total(self, num_layers: int) -> float:
        """FLOPs of the whole model."""
        return self.tower.total + self.projector.total + num_layers * self.layer.total + self.head.total


def model_flops(model: ModelConfig, amounts: WorkloadCounts) -> float:
    """Model FLOPs of one step, the numerator of MFU. Counts exclude padding."""
    return flops_by_part(model, amounts).total(model.language.num_layers)


def hardware_flops(
    model: ModelConfig, amounts: WorkloadCounts, execution: ExecutionOptions = ExecutionOptions()
) -> float:
    """Hardware FLOPs of one step, the numerator of HFU. Counts include padding and blank images."""
    return flops_by_part(model, amounts, execution).total(model.language.num_layers)


def flops_by_part(
    model: ModelConfig, amounts: WorkloadCounts, execution: ExecutionOptions | None = None
) -> FlopsByPart:
    """FLOPs by part of the model; without `execution`, model FLOPs."""
    return FlopsByPart(
        tower=_tower(model, execution) * amounts.images,
        projector=_projector(model) * amounts.images,
        layer=_layer(model, amounts, execution),
        head=_head(model, amounts, execution),
    )


def _products(products: float, *, input_gradient: bool, weight_gradient: bool) -> Flops:
    """FLOPs of a matrix with `products` multiply-adds."""
    return Flops(forward=2 * products, backward=2 * products * (input_gradient + weight_gradient))


def _attention(products: float, *, backward: bool, execution: ExecutionOptions | None) -> Flops:
    """FLOPs of attention with `products` multiply-adds for the scores and as many for the values.

    Backward is twice that, plus the recomputed scores of a flash kernel.
    """
    recomputed = 2.5 if execution and execution.flash else 2.0
    return Flops(attention_forward=4 * products, attention_backward=4 * products * recomputed * backward)


def layer_weights(model: ModelConfig) -> int:
    """Elements of the matrices of one decoder layer."""
    language = model.language
    attention = 2 * language.hidden_size * (language.query_width + language.key_width)
    return attention + 3 * language.hidden_size * language.intermediate_size


def _layer(model: ModelConfig, amounts: WorkloadCounts, execution: ExecutionOptions | None) -> Flops:
    # Something before every layer trains, or nothing does; with a frozen language model it is the projector or the
    # tower.
    matrices = _products(
        amounts.positions * layer_weights(model), input_gradient=True, weight_gradient=model.trainable.language
    )
    attention = _attention(amounts.squares / 2 * model.language.query_width, backward=True, execution=execution)
    mlp = 3 * model.language.hidden_size * model.language.intermediate_size / layer_weights(model)
    recomputed = (
        _recomputed(matrices + attention, execution.recompute, execution.recompute_modules, mlp=mlp)
        if execution
        else Flops()
    )
    share = execution.recompute_share if execution and execution.recompute == "full" else 1.0
    return matrices + attention + recomputed * share


def _recomputed(layer: Flops, recompute: Recompute, modules: tuple[str, ...], *, mlp: float) -> Flops:
    """FLOPs of recomputing a layer in the backward pass; `mlp`: the MLP's share of its matrices."""
    whole, selective = recompute == "full", recompute == "selective"
    return Flops(
        backward=layer.forward * (1.0 if whole else mlp * (selective and "mlp" in modules)),
        attention_backward=layer.attention_forward * (whole or (selective and "core_attn" in modules)),
    )


def _head(model: ModelConfig, amounts: WorkloadCounts, execution: ExecutionOptions | None) -> Flops:
    language = model.language
    rows = language.vocab_size if execution is None else language.padded_vocab_size
    work = _products(
        amounts.head_rows * language.hidden_size * rows, input_gradient=True, weight_gradient=model.trainable.language
    )
    return work + Flops(backward=work.forward) if execution and execution.fused_head else work


def trained_blocks(model: ModelConfig) -> int:
    """Number of trained tower blocks, counted from its end."""
    start = model.trainable.vision_from_block
    return 0 if start is None else model.vision.num_built_layers - max(start, 0)


def _tower(model: ModelConfig, execution: ExecutionOptions | None) -> Flops:
    """FLOPs of one image."""
    vision, trained = model.vision, trained_blocks(model)
    frozen, tokens = vision.num_built_layers - trained, vision.num_positions
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    stem = _products(
        vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size,
        input_gradient=False,  # pixels
        weight_gradient=model.trainable.vision_from_block == -1,
    )
    # Also in the first trained block: the LayerNorm before its first matrix needs its gradient.
    block = _products(tokens * weights, input_gradient=True, weight_gradient=True)
    block += _attention(tokens * tokens * vision.hidden_size, backward=True, execution=execution)
    forward = Flops(forward=block.forward, attention_forward=block.attention_forward)
    if execution:
        mlp = 2 * vision.hidden_size * vision.intermediate_size / weights
        block += _recomputed(forward, execution.recompute_tower, execution.recompute_modules, mlp=mlp)
    return stem + forward * frozen + block * trained


def _projector(model: ModelConfig) -> Flops:
    """FLOPs of one image."""
    vision, width, trains = model.vision, model.language.hidden_size, model.trainable.projector
    before = model.trainable.vision_from_block is not None
    first = _products(vision.num_features * vision.feature_width * width, input_gradient=before, weight_gradient=trains)
    later = _products(vision.num_features * width * width, input_gradient=before or trains, weight_gradient=trains)
    return first + later * (model.projector.depth - 1)

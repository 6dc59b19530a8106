"""Degrees of parallelism of a run, and the model sizes that they divide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_share4v.config.base import Bool, Conflict, NonNegativeInt, PositiveInt, config
from megatron_share4v.config.model import ModelConfig


@config
class ParallelConfig:
    """Degrees of parallelism; the data-parallel size follows from the world size."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: PositiveInt = 1
    """Ranks that share the positions of each sequence, for packs too long for one rank. Attention exchanges heads
    between them (Ulysses), so tensor x context must divide the number of heads."""
    sequence: Bool = False
    """Sequence parallelism in the language model (needs tensor > 1)."""
    distributed_optimizer: Bool = True
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: Bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: Bool = False
    """Gather updated weights during the next forward pass (needs distributed_optimizer and overlap_grad_reduce)."""
    overlap_tensor: Bool = False
    """Overlap tensor-parallel communication with matrix products by Transformer Engine's user buffers
    (config/overlap.py). Not yet tested on a GPU."""
    layout: Literal["auto"] | tuple[PositiveInt, ...] = "auto"
    """Decoder layers on each of the pipeline x virtual stages, in the model's order. `auto`: balance the time of the
    pipeline ranks, counting tower and projector on the first stage, the head on the last, and which of them train."""
    timeout_s: PositiveInt = 600
    """A collective that waits longer than this ends the job."""
    check_replicas_every_steps: NonNegativeInt = 100
    """Compare the weights of all data-parallel replicas, also before each save; a difference ends the job with exit
    code 77. 0: never."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find degrees that need another one, or that are not available."""
        if self.sequence and self.tensor == 1:
            yield Conflict("sequence true needs tensor > 1, got tensor 1", ("sequence", "tensor"))
        if self.virtual > 1 and self.pipeline == 1:
            yield Conflict(f"virtual {self.virtual} needs pipeline > 1, got pipeline 1", ("virtual", "pipeline"))
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            message = "overlap_param_gather true needs distributed_optimizer true and overlap_grad_reduce true"
            yield Conflict(message, ("overlap_param_gather", "distributed_optimizer", "overlap_grad_reduce"))
        if self.overlap_tensor and not self.sequence:
            needs = "needs tensor > 1 and sequence true"
            message = f"overlap_tensor true {needs}, got tensor {self.tensor} and sequence false"
            yield Conflict(message, ("overlap_tensor", "tensor", "sequence"))
        if self.layout != "auto" and len(self.layout) != self.pipeline * self.virtual:
            stages = f"pipeline {self.pipeline} x virtual {self.virtual} has {self.pipeline * self.virtual}"
            message = f"layout {list(self.layout)} names {len(self.layout)} stages; {stages}"
            yield Conflict(message, ("layout", "pipeline", "virtual"))


def layout_conflicts(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Conflict]:
    """Find model sizes that the degrees of parallelism do not divide."""
    language, vision, tensor = model.language, model.vision, parallel.tensor
    sharded = {
        "model.language.num_attention_heads": language.num_attention_heads,
        "model.language.intermediate_size": language.intermediate_size,
        "model.language.padded_vocab_size": language.padded_vocab_size,
        "model.vision.num_attention_heads": vision.num_attention_heads,
        "model.vision.intermediate_size": vision.intermediate_size,
    }
    for name, size in sharded.items():
        if size % tensor:
            yield Conflict(f"{name} {size} is not divisible by parallel.tensor {tensor}", ("parallel.tensor", name))
    yield from _head_conflicts(model, parallel)
    if parallel.layout != "auto" and sum(parallel.layout) != language.num_layers:
        total = f"parallel.layout {list(parallel.layout)} adds up to {sum(parallel.layout)} layers"
        message = f"{total}; model.language.num_layers is {language.num_layers}"
        yield Conflict(message, ("parallel.layout", "model.language.num_layers"))
    stages = parallel.pipeline * parallel.virtual
    if stages > language.num_layers:
        limit = f"model.language.num_layers {language.num_layers}"
        message = f"parallel.pipeline x parallel.virtual {stages} exceeds {limit}"
        yield Conflict(message, ("parallel.pipeline", "parallel.virtual", "model.language.num_layers"))


def _head_conflicts(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Conflict]:
    """Find numbers of attention heads and KV heads that tensor and context parallelism do not divide."""
    tensor, context = parallel.tensor, parallel.context
    heads, groups = model.language.num_attention_heads, model.language.num_key_value_heads
    if groups % tensor and tensor % groups:
        message = (
            f"model.language.num_key_value_heads {groups} and parallel.tensor {tensor} do not divide each other: each "
            f"tensor rank needs whole key/value heads, or several ranks share one; set parallel.tensor to a divisor or "
            f"a multiple of {groups}"
        )
        yield Conflict(message, ("parallel.tensor", "model.language.num_key_value_heads"))
    if context > 1 and heads % (tensor * context):
        degrees = f"parallel.tensor {tensor} x parallel.context {context}"
        message = f"model.language.num_attention_heads {heads} is not divisible by {degrees}"
        yield Conflict(message, ("parallel.tensor", "parallel.context", "model.language.num_attention_heads"))
    own = max(groups // tensor, 1)
    if heads % (tensor * context) == 0 and own % context and context % own:
        message = (
            f"the {own} model.language.num_key_value_heads of a tensor rank and parallel.context {context} "
            f"do not divide each other; set parallel.context to a divisor or a multiple of {own}"
        )
        yield Conflict(message, ("parallel.tensor", "parallel.context", "model.language.num_key_value_heads"))

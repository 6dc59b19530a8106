"""Which decoder layers live on which pipeline stage, when the tower, the embedding and the head cost something too. Pure integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import ParallelConfig

# Mean caption length of ShareGPT4V-PT in tokens; only the balance of the pipeline depends on it.
TYPICAL_TEXT_LENGTH = 200


@dataclass(frozen=True)
class StageCosts:
    """Multiply-adds per sample, forward and backward, of the parts that pipeline stages are made of."""

    layer: float
    first: float
    """Tower and projector (the embedding is a lookup)."""
    last: float
    """Head and loss."""


def estimate_costs(model: ModelConfig, *, text_length: int, trained_share: float = 0.5) -> StageCosts:
    """Costs of one sample with one image and `text_length` text tokens, of which `trained_share` carry a label.

    A trained matrix costs three products (forward, gradient to the input, gradient to the weight), a frozen one with something trained
    before it two, a frozen one with nothing trained before it one.
    """
    vision, language, trainable = model.vision, model.language, model.trainable
    length = vision.num_patches + text_length
    head_dim = language.hidden_size // language.num_attention_heads
    matrices = 2 * language.hidden_size * (language.hidden_size + language.num_key_value_heads * head_dim)
    matrices += 3 * language.hidden_size * language.intermediate_size
    products = 3 if trainable.language else 2
    layer = products * length * (matrices + length * language.hidden_size)
    tokens = vision.num_patches + 1
    block = tokens * (
        4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size + 2 * tokens * vision.hidden_size
    )
    start = trainable.vision_from_block
    trained_blocks = 0 if start is None else vision.num_built_layers - max(start, 0)
    tower = block * (vision.num_built_layers + 2 * trained_blocks)
    projector = 3 * vision.num_patches * (vision.hidden_size + language.hidden_size) * language.hidden_size
    head = products * trained_share * text_length * language.hidden_size * language.padded_vocab_size
    return StageCosts(layer=layer, first=tower + projector, last=head)


def layers_per_stage(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Decoder layers on each pipeline stage: as `parallel.layout` says, or counting tower, projector and head as cost."""
    if parallel.layout != "auto":
        return parallel.layout
    costs = estimate_costs(model, text_length=TYPICAL_TEXT_LENGTH)
    return split_layers(
        model.language.num_layers, stages=parallel.pipeline * parallel.virtual, pipeline=parallel.pipeline, costs=costs
    )


def split_layers(num_layers: int, *, stages: int, pipeline: int, costs: StageCosts) -> tuple[int, ...]:
    """Decoder layers per stage (`stages` = pipeline x virtual, in order), at least one each, so that the slowest pipeline rank is fastest.

    Pipeline rank r runs stages r, r + pipeline, ... Layers are handed out one by one to the stage of the least loaded rank, which is optimal
    for equal layers; among equals the later rank takes one first, since the first also holds the tower's activations.
    """
    assert 0 < stages <= num_layers and stages % pipeline == 0, (num_layers, stages, pipeline)
    counts = [1] * stages
    load = [costs.layer * (stages // pipeline)] * pipeline
    load[0] += costs.first
    load[-1] += costs.last
    for _ in range(num_layers - stages):
        rank = min(range(pipeline), key=lambda r: (load[r], -r))
        stage = min(range(rank, stages, pipeline), key=lambda s: counts[s])
        counts[stage] += 1
        load[rank] += costs.layer
    return tuple(counts)


def describe_stages(counts: Sequence[int], *, pipeline: int) -> str:
    """One line for the log: decoder layers on each pipeline rank, chunk by chunk."""
    ranks = ["+".join(str(counts[stage]) for stage in range(rank, len(counts), pipeline)) for rank in range(pipeline)]
    return "decoder layers per pipeline rank: " + ", ".join(ranks)

"""Split of the decoder layers over pipeline stages by cost, counting the tower, the embedding and the head.

Pure integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.model.flops import layer_weights

# Mean caption length of ShareGPT4V-PT in tokens; affects only the balance of the pipeline.
TYPICAL_TEXT_LENGTH = 200


@dataclass(frozen=True)
class StageCosts:
    """Multiply-adds per sample, forward and backward, of the parts of pipeline stages."""

    layer: float
    first: float
    """Tower and projector (the embedding is a lookup)."""
    last: float
    """Head and loss."""


def estimate_costs(model: ModelConfig, *, text_length: int, trained_share: float = 0.5) -> StageCosts:
    """Estimate the cost of a sample with one image and `text_length` text tokens.

    A fraction `trained_share` of the text tokens have a label. A trained matrix costs three products (forward, input
    gradient, weight gradient), a frozen one with trained parameters before it two, a frozen one without them one; the
    head one more, since its backward pass computes the logits again.
    """
    vision, language, trainable = model.vision, model.language, model.trainable
    length = vision.num_features + text_length
    products = 3 if trainable.language else 2
    layer = products * length * (layer_weights(model) + length * language.query_width)
    tokens = vision.num_positions
    block = tokens * (
        4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size + 2 * tokens * vision.hidden_size
    )
    start = trainable.vision_from_block
    trained_blocks = 0 if start is None else vision.num_built_layers - max(start, 0)
    tower = block * (vision.num_built_layers + 2 * trained_blocks)
    inputs = vision.feature_width + (model.projector.depth - 1) * language.hidden_size
    projector = 3 * vision.num_features * inputs * language.hidden_size
    head = (products + 1) * trained_share * text_length * language.hidden_size * language.padded_vocab_size
    return StageCosts(layer=layer, first=tower + projector, last=head)


def layers_per_stage(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Decoder layers on each pipeline stage: `parallel.layout`, or balanced by cost."""
    if parallel.layout != "auto":
        return parallel.layout
    costs = estimate_costs(model, text_length=TYPICAL_TEXT_LENGTH)
    return split_layers(
        model.language.num_layers, stages=parallel.pipeline * parallel.virtual, pipeline=parallel.pipeline, costs=costs
    )


def split_layers(num_layers: int, *, stages: int, pipeline: int, costs: StageCosts) -> tuple[int, ...]:
    """Split decoder layers over `stages` so that the most loaded pipeline rank has the least load.

    `stages` = pipeline x virtual, in order; each gets at least one layer. Pipeline rank r runs stages r, r + pipeline,
    ... Layers are assigned one by one to the least loaded rank, which is optimal for equal layers; on a tie the later
    rank gets one, since the first also holds the tower's activations.
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
    """Format the decoder layers of each pipeline rank, chunk by chunk, as one log line."""
    ranks = ["+".join(str(counts[stage]) for stage in range(rank, len(counts), pipeline)) for rank in range(pipeline)]
    return "decoder layers per pipeline rank: " + ", ".join(ranks)

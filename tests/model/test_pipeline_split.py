"""Split of decoder layers over pipeline stages: never worse than the best split, and costly ends get fewer layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_share4v.config.model import LanguageConfig, ModelConfig, TrainableConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.model.pipeline_split import (
    StageCosts,
    describe_stages,
    estimate_costs,
    layers_per_stage,
    split_layers,
)


def _slowest(counts: Sequence[int], pipeline: int, costs: StageCosts) -> float:
    load = [costs.layer * sum(counts[rank::pipeline]) for rank in range(pipeline)]
    load[0] += costs.first
    load[-1] += costs.last
    return max(load)


def _all_ways(num_layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, num_layers), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, num_layers))) for cut in cuts]


@pytest.mark.parametrize("first", [0, 0.5, 3, 20])
@pytest.mark.parametrize("last", [0, 1, 2.5])
@pytest.mark.parametrize(
    ("num_layers", "stages", "pipeline"), [(8, 2, 2), (9, 3, 3), (10, 4, 2), (8, 4, 4), (7, 6, 3), (4, 4, 2), (5, 1, 1)]
)
def test_split_is_optimal(num_layers: int, stages: int, pipeline: int, first: float, last: float) -> None:
    costs = StageCosts(layer=1, first=first, last=last)
    counts = split_layers(num_layers, stages=stages, pipeline=pipeline, costs=costs)
    assert sum(counts) == num_layers and min(counts) >= 1 and len(counts) == stages
    best = min(_slowest(way, pipeline, costs) for way in _all_ways(num_layers, stages))
    assert _slowest(counts, pipeline, costs) == pytest.approx(best)


def test_equal_costs_give_equal_stages() -> None:
    assert split_layers(32, stages=4, pipeline=4, costs=StageCosts(layer=1, first=0, last=0)) == (8, 8, 8, 8)


def test_costly_tower_moves_layers_off_the_first_rank() -> None:
    assert split_layers(32, stages=4, pipeline=4, costs=StageCosts(layer=1, first=4, last=0)) == (5, 9, 9, 9)
    assert split_layers(8, stages=4, pipeline=2, costs=StageCosts(layer=1, first=4, last=0)) == (1, 3, 1, 3)


def test_ties_give_the_first_rank_fewer_layers() -> None:
    assert split_layers(5, stages=2, pipeline=2, costs=StageCosts(layer=1, first=0, last=0)) == (2, 3)


def test_trained_parts_cost_more_than_frozen_ones() -> None:
    frozen = estimate_costs(ModelConfig(), text_length=200)
    half = estimate_costs(ModelConfig(trainable=TrainableConfig(vision_from_block=12)), text_length=200)
    whole = estimate_costs(ModelConfig(trainable=TrainableConfig(vision_from_block=-1)), text_length=200)
    assert frozen.first < half.first < whole.first
    assert frozen.layer == half.layer == whole.layer
    projector_only = estimate_costs(ModelConfig(trainable=TrainableConfig(language=False)), text_length=200)
    assert projector_only.layer == pytest.approx(frozen.layer * 2 / 3)


def test_the_7b_pipeline_is_balanced_within_one_layer() -> None:
    model = ModelConfig(trainable=TrainableConfig(vision_from_block=12))
    costs = estimate_costs(model, text_length=200)
    counts = split_layers(32, stages=8, pipeline=8, costs=costs)
    mean = (32 * costs.layer + costs.first + costs.last) / 8
    assert _slowest(counts, 8, costs) - mean < costs.layer


def test_large_vocabulary_moves_layers_off_the_last_rank() -> None:
    """Qwen2.5-0.5B: its head costs as much as one and a half of its layers, LLaMA's would a third."""
    language = LanguageConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = ModelConfig(language=language)
    small = replace(model, language=replace(language, vocab_size=32000))
    costs = estimate_costs(model, text_length=200)
    assert costs.last / costs.layer == pytest.approx(1.5, abs=0.1)
    large, few = (layers_per_stage(one, ParallelConfig(pipeline=4)) for one in (model, small))
    assert (large, few) == ((2, 8, 8, 6), (2, 7, 8, 7))


def test_the_log_line_shows_chunks_of_a_rank_together() -> None:
    assert describe_stages((1, 2, 3, 4), pipeline=2) == "decoder layers per pipeline rank: 1+3, 2+4"


def test_explicit_layout() -> None:
    model = ModelConfig()
    assert layers_per_stage(model, ParallelConfig(pipeline=4, layout=(5, 9, 9, 9))) == (5, 9, 9, 9)
    whole = replace(model, trainable=TrainableConfig(vision_from_block=-1))
    frozen, trained = (layers_per_stage(one, ParallelConfig(pipeline=8)) for one in (model, whole))
    # Tower and projector cost 0.46 of a decoder layer when frozen and 1.2 when fully trained.
    assert frozen == (4,) * 8 and sum(trained) == 32 and trained[0] == 3, (frozen, trained)
    with pytest.raises(ValueError, match="names 2 stages; pipeline 4 x virtual 1 has 4"):
        ParallelConfig(pipeline=4, layout=(16, 16))
    with pytest.raises(ValueError, match="needs distributed_optimizer true and overlap_grad_reduce true"):
        ParallelConfig(overlap_param_gather=True)

"""The published models, built on the meta device: their parameters add up to the published counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_share4v.config.load import load
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.model.pipeline_split import layers_per_stage
from megatron_share4v.model.share4v import PipelineStage, Share4V

PUBLISHED_TOWER = 303_507_456
BLOCK = 12_596_224
POST_LAYERNORM = 2 * 1024
COUNTS = {
    "share4v_7b": {"projector": 20_979_712, "language": 6_738_415_616},
    "share4v_13b": {"projector": 31_467_520, "language": 13_015_864_320},
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name: str, mesh: Mesh, repository: Path) -> None:
    model = load(ModelConfig, repository / "examples" / "models" / f"{name}.yaml")
    parallel = ParallelConfig()
    with torch.device("meta"):
        chunk = Share4V(
            model,
            mesh=mesh,
            parallel=parallel,
            dtype=torch.bfloat16,
            ops="reference",
            options=LayerOptions(),
            layers_per_stage=layers_per_stage(model, parallel),
            pipeline_stage=PipelineStage(stage=0, num_stages=1, chunk=None),
        )
    assert all(parameter.is_meta for parameter in chunk.parameters()), "building took memory"
    counts = {
        part: sum(parameter.numel() for parameter in getattr(chunk, part).parameters())
        for part in ("vision", "projector", "language")
    }
    # The last block comes after the feature layer, and the post-LayerNorm is for the pooled class token: neither is
    # built.
    assert counts.pop("vision") + BLOCK + POST_LAYERNORM == PUBLISHED_TOWER
    assert sum(parameter.numel() for parameter in chunk.vision.layers[0].parameters()) == BLOCK
    assert counts == COUNTS[name]

"""Towers of other families: every layout gives the one-rank loss, norm and weights.

Overlapped reduction sends a blank image through the tower for the micro-batches without images. Layer scales are
replicated over the TP group.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_world
from layout_training import Outcome, Variant, require_equal, run_variants

SELECTION: dict[int, dict[tuple[int, int, int, int], list[dict[str, Any]]]] = {
    2: {
        (2, 1, 1, 1): [
            {"tower": "dinov2", "trainable": "half_tower", "ops": "reference", "recompute": "selective"},
            {"tower": "siglip", "recompute": "full"},
        ],
        (1, 1, 1, 1): [{"tower": "dinov2", "overlap": True, "gather": True}],
        (1, 1, 1, 2): [{"tower": "siglip", "overlap": True}],
    },
    4: {(2, 2, 1, 1): [{"tower": "dinov2", "sequence": True}]},
}
"""Variants by world size and (tensor, pipeline, virtual, context). The whole tower trains unless they say otherwise."""
DEFAULTS = {"trainable": "whole_tower", "family": "biased"}  # that family has four layers
PLACE = ("tensor", "pipeline", "virtual", "context")


def groups_of(world: int) -> list[tuple[tuple[int, int, int, int], list[Variant]]]:
    """Return the layouts of a world size and their variants."""
    return [
        (place, [Variant(**{**DEFAULTS, **dict(zip(PLACE, place)), **change}) for change in changes])
        for place, changes in SELECTION[world].items()
    ]


def key_of(variant: Variant) -> tuple[str, str, str]:
    """Return what decides a variant's outcome at one rank."""
    return variant.tower, variant.trainable, variant.ops


@pytest.fixture(scope="module")
def reference() -> dict[tuple[str, str, str], Outcome]:
    """Outcomes of one rank."""
    keys = {key_of(variant) for world in SELECTION for _, variants in groups_of(world) for variant in variants}
    wanted = [
        Variant(**DEFAULTS | {"tower": tower, "trainable": trainable, "ops": ops})
        for tower, trainable, ops in sorted(keys)
    ]
    [results] = run_world(1, run_variants, [((1, 1, 1, 1), wanted)])
    return {key_of(variant): outcome for variant, outcome in results}


@pytest.mark.parametrize("world", SELECTION)
def test_every_layout_equals_one_rank(world: int, reference: dict[tuple[str, str, str], Outcome]) -> None:
    for variant, outcome in run_world(world, run_variants, groups_of(world))[0]:
        require_equal(variant, outcome, reference[key_of(variant)])


def test_what_trains_moves(reference: dict[tuple[str, str, str], Outcome]) -> None:
    whole, half = (
        reference["dinov2", part, ops].weights for part, ops in (("whole_tower", "auto"), ("half_tower", "reference"))
    )
    moved = {key for key in whole if key.startswith("vision") and not torch.equal(whole[key], half[key])}
    first = {key for key in whole if key.startswith("vision") and not key.startswith("vision.layers.1.")}
    assert first <= moved and "vision.layers.0.self_attention.layer_scale" in first
    assert "vision.patch_embedding.bias" in first and "vision.pre_layernorm.weight" not in whole
    assert all((half[f"vision.layers.0.{part}.layer_scale"] == 1).all() for part in ("self_attention", "mlp"))
    assert not (half["vision.layers.1.mlp.layer_scale"] == 1).all()
    assert "vision.class_embedding" not in reference["siglip", "whole_tower", "auto"].weights

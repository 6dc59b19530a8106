"""Tied heads, q/k norms, own head widths and biases: every layout gives the one-rank loss, norm and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_world
from layout_training import Outcome, Variant, require_equal, run_variants
from tiny import FAMILIES
from tolerances import FP32_GRADIENT

OTHERS = tuple(name for name in FAMILIES if name != "plain")
SELECTION: dict[int, dict[tuple[int, int, int, int], list[dict[str, Any]]]] = {
    2: {
        (2, 1, 1, 1): [
            {"family": "qk_norm"},
            {"family": "qk_norm", "sequence": True, "distributed_optimizer": False},
            {"family": "biased", "sequence": True},
            {"family": "all", "sequence": True, "ops": "reference"},
        ],
        (1, 2, 1, 1): [{"family": "tied"}, {"family": "all", "ops": "reference", "recompute": "full"}],
        (1, 2, 2, 1): [{"family": "tied", "distributed_optimizer": False}],
        (1, 1, 1, 1): [{"family": "tied", "overlap": True, "gather": True}],
        (1, 1, 1, 2): [{"family": "all"}],
    },
    4: {
        (1, 2, 1, 1): [
            {"family": "tied", "overlap": True, "gather": True},
            {"family": "tied", "distributed_optimizer": False, "trainable": "projector"},
        ],
        (1, 2, 2, 1): [{"family": "tied", "overlap": True}],
        (2, 2, 1, 1): [{"family": "all", "sequence": True}, {"family": "biased", "recompute": "full"}],
        # two key/value heads on four ranks
        (4, 1, 1, 1): [{"family": "all"}, {"family": "qk_norm", "sequence": True}],
        (1, 4, 1, 1): [{"family": "tied"}],
        (1, 1, 1, 4): [{"family": "biased"}],
    },
    8: {(2, 2, 2, 1): [{"family": "all", "sequence": True, "overlap": True, "gather": True}]},
}
"""Variants by world size and (tensor, pipeline, virtual, context)."""


PLACE = ("tensor", "pipeline", "virtual", "context")


def selection_of(world: int, *, full: bool) -> list[tuple[tuple[int, int, int, int], list[Variant]]]:
    """Return the groups of a world size: every family in every variant of the selection, or the selection."""
    return [
        (
            place,
            [Variant(**dict(zip(PLACE, place)), **change) for change in (every_family(changes) if full else changes)],
        )
        for place, changes in SELECTION[world].items()
    ]


def every_family(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the changes with each family in place of their own, without duplicates."""
    found = [change | {"family": name} for change in changes for name in OTHERS]
    return [change for number, change in enumerate(found) if change not in found[:number]]


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> dict[tuple[str, str, str], Outcome]:
    """Outcomes of one rank for each family, trainable set and implementation of the ops that the tests need."""
    full = any("full" in item.name for item in request.session.items)
    variants = [variant for world in SELECTION for _, found in selection_of(world, full=full) for variant in found]
    wanted = dict.fromkeys(Variant(family=v.family, trainable=v.trainable, ops=v.ops) for v in variants)
    [results] = run_world(1, run_variants, [((1, 1, 1, 1), list(wanted))])
    return {(variant.family, variant.trainable, variant.ops): outcome for variant, outcome in results}


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["selection", "full"])
@pytest.mark.parametrize("world", SELECTION)
def test_every_layout_equals_one_rank(world: int, full: bool, reference: dict[tuple[str, str, str], Outcome]) -> None:
    groups = selection_of(world, full=full)
    results = run_world(world, run_variants, groups)[0]
    assert len(results) == sum(len(variants) for _, variants in groups)
    for variant, outcome in results:
        require_equal(variant, outcome, reference[variant.family, variant.trainable, variant.ops])


def test_tied_embedding_counts_once(reference: dict[tuple[str, str, str], Outcome]) -> None:
    """The second copy is no global tensor, and the head's padded rows stay zero."""
    tied, biased = (reference[name, "half_tower", "auto"] for name in ("tied", "biased"))
    assert "language.head.weight" in biased.weights and "language.head.weight" not in tied.weights
    embedding = tied.weights["language.embedding.weight"]
    assert not embedding[100:].any() and embedding.isfinite().all()
    assert sum(count for (part, _), count in tied.counts.items() if part == "language") == sum(
        weight.numel() for name, weight in tied.weights.items() if name.startswith("language.")
    )


def head_norm_gradients(tensor: int, sequence: bool) -> dict[str, torch.Tensor]:
    """Return the gradients of all q/k norms after one step's backward passes."""
    from small_run import MICRO_BATCHES, Run, Setting
    from tiny import MICRO_BATCH, micro_batches, step_items

    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout
    from megatron_share4v.train.data_feed import StepData
    from megatron_share4v.train.step import StepSettings, compute_gradients

    setting = Setting(family="qk_norm", tensor=tensor, sequence=sequence, distributed_optimizer=False)
    with open_mesh(Layout(tensor=tensor), device=Device("cpu")) as mesh:
        run = Run(mesh, setting, seed=1)
        data = StepData(step_items(0), micro_batches(0)[:MICRO_BATCHES], 0.0)
        settings = StepSettings(mesh=mesh, micro_batch_size=MICRO_BATCH)
        compute_gradients(run.chunks, run.optimizer, data, settings=settings)
        return {
            name: parameter.main_grad.clone()
            for name, parameter in run.bare[0].named_parameters()
            if name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        }


@pytest.mark.parametrize("sequence", [False, True])
def test_head_norm_gradients_are_summed_over_tensor_ranks(sequence: bool) -> None:
    """Each rank sees a part of the heads, and the weight is one for all of them."""
    [whole] = run_world(1, head_norm_gradients, 1, False)
    assert len(whole) == 8 and all(gradient.abs().max() > 1e-6 for gradient in whole.values())
    for gradients in run_world(2, head_norm_gradients, 2, sequence):
        for name, gradient in gradients.items():
            assert (gradient - whole[name]).abs().max() <= FP32_GRADIENT * whole[name].abs().max(), name

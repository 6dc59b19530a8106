"""Every layout gives the one-rank loss, gradient norm and weights for the same global batches.

With native ops where there is a compiler; with their references at some layouts.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from harness import run_world
from layout_training import Outcome, Variant, require_equal, run_variants
from tolerances import BF16_LOSS, GOLDEN_LOSS

OPS = ("auto", "reference")
PARTS = ("half_tower", "projector", "frozen_tower")
"""What trains: names of layout_training.TRAINABLE."""
WORLDS = (1, 2, 4, 8)


def variants_of(tensor: int, pipeline: int, virtual: int, data: int) -> list[Variant]:
    """Return the variants of a layout without context parallelism.

    Sequence parallelism and distributed optimizer on and off, overlap, and for some layouts other trainable parts.
    """
    place = dict(tensor=tensor, pipeline=pipeline, virtual=virtual)
    variants = [
        Variant(**place, sequence=sequence, distributed_optimizer=distributed)
        for sequence in ([False, True] if tensor > 1 else [False])
        for distributed in (True, False)
    ]
    if data > 1:
        variants.append(Variant(**place, overlap=True))
    if (tensor, pipeline, virtual, data) in [(1, 1, 1, 2), (1, 2, 2, 2), (2, 2, 1, 2)]:
        variants.append(Variant(**place, sequence=tensor > 1, overlap=True, gather=True))
    if (tensor, pipeline, virtual, data) in [(2, 2, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2)]:
        variants += [
            Variant(**place, trainable="projector"),
            Variant(**place, trainable="frozen_tower"),
            Variant(**place, normalize="microbatch"),
        ]
    if (tensor, pipeline, virtual, data) == (2, 2, 1, 2):
        variants += [Variant(**place, dtype="bf16", sequence=True, ops=ops) for ops in ("auto", "reference")]
    if (tensor, pipeline, virtual, data) in [(2, 2, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2)]:
        variants.append(Variant(**place, sequence=tensor > 1, ops="reference"))
    recompute = {(1, 1, 1, 2): ("selective",), (2, 2, 1, 1): ("full", "selective"), (1, 2, 2, 1): ("full",)}.get(
        (tensor, pipeline, virtual, data), ()
    )
    variants += [Variant(**place, sequence=tensor > 1, recompute=what, overlap=data > 1) for what in recompute]
    uneven = {(2, 2, 1, 1): (5, 3), (1, 4, 1, 1): (1, 3, 3, 1), (1, 2, 2, 1): (1, 3, 2, 2)}.get(
        (tensor, pipeline, virtual, data)
    )
    if uneven is not None:
        variants.append(Variant(**place, sequence=tensor > 1, layout=uneven))
    plain = [(1, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (1, 4, 1, 1), (1, 2, 1, 2)]
    if (tensor, pipeline, virtual, data) in [*plain, (1, 2, 2, 1), (1, 4, 2, 1), (2, 2, 2, 2)]:
        variants.append(Variant(**place, sequence=tensor > 1, lengths="cropped"))
    return variants


WITH_CONTEXT: dict[int, dict[tuple[int, int, int, int], list[dict]]] = {
    2: {
        (1, 1, 1, 2): [
            {"overlap": True, "gather": True},
            {"normalize": "microbatch", "distributed_optimizer": False},
            {"trainable": "projector"},
            {"ops": "reference", "recompute": "selective"},
        ]
    },
    4: {
        (2, 1, 1, 2): [{"sequence": True}],
        (1, 2, 1, 2): [{"lengths": "cropped"}, {"recompute": "full", "normalize": "microbatch"}],
        (1, 1, 1, 2): [{}],
        # 3 and 5 positions on a rank, so that images of 4 cross rank boundaries
        (1, 1, 1, 4): [{"lengths": "cropped"}],
    },
    8: {(2, 2, 2, 2): [{"sequence": True}]},
}
"""Variants with context parallelism by world size, as changes of a Variant."""


def groups_of(world: int) -> list[tuple[tuple[int, int, int, int], list[Variant]]]:
    """Return (tensor, pipeline, virtual, context) and its variants."""
    groups = [((*layout, 1), variants_of(*layout, world // (layout[0] * layout[1]))) for layout in layouts_of(world)]
    for (tensor, pipeline, virtual, context), changes in WITH_CONTEXT.get(world, {}).items():
        place = dict(tensor=tensor, pipeline=pipeline, virtual=virtual, context=context)
        groups.append(((tensor, pipeline, virtual, context), [Variant(**place, **change) for change in changes]))
    return groups


def pairs_of(world: int, variant: Variant) -> set[tuple[tuple[str, object], ...]]:
    """Return all pairs of (setting, value) in a variant, with the number of ranks among the settings."""
    return set(itertools.combinations(sorted({"world": world, **asdict(variant)}.items()), 2))


@cache
def pairwise() -> frozenset[tuple[int, Variant]]:
    """Select (world, variant) of the full matrix so that every pair of values in it occurs in the selection.

    Greedy: the variant with the most uncovered pairs first, ties in the order of the matrix.
    """
    matrix = [(world, variant) for world in WORLDS for _, variants in groups_of(world) for variant in variants]
    missing = set().union(*(pairs_of(*entry) for entry in matrix))
    selected = []
    while missing:
        best = max(matrix, key=lambda entry: len(pairs_of(*entry) & missing))
        selected.append(best)
        missing -= pairs_of(*best)
    return frozenset(selected)


def selection_of(world: int, *, full: bool) -> list[tuple[tuple[int, int, int, int], list[Variant]]]:
    """Return the groups of a world size: the full matrix, or its pairwise selection."""
    groups = groups_of(world)
    if not full:
        groups = [(place, [v for v in variants if (world, v) in pairwise()]) for place, variants in groups]
    return [(place, variants) for place, variants in groups if variants]


def layouts_of(world: int) -> list[tuple[int, int, int]]:
    """Return {tensor 1,2} x {pipeline 1,2,4} x {virtual 1,2} with data 1 or 2."""
    return [
        (tensor, pipeline, virtual)
        for tensor, pipeline, virtual in itertools.product((1, 2), (1, 2, 4), (1, 2))
        if world % (tensor * pipeline) == 0
        and world // (tensor * pipeline) in (1, 2)
        and (pipeline > 1 or virtual == 1)
    ]


@pytest.fixture(scope="module")
def reference() -> dict[tuple[str, str, str, str], Outcome]:
    """Outcomes of one rank for each trainable set and normalization, with native ops and their references."""
    wanted = [Variant(trainable=name, ops=ops) for name in PARTS for ops in OPS] + [
        Variant(normalize="microbatch", ops=ops) for ops in OPS
    ]
    wanted.append(Variant(lengths="masked"))
    [results] = run_world(1, run_variants, [((1, 1, 1, 1), wanted)])
    return {
        (variant.trainable, variant.normalize, variant.ops, variant.lengths): outcome for variant, outcome in results
    }


def test_pairwise_selection_is_smaller_and_covers_every_pair() -> None:
    matrix = {(world, variant) for world in WORLDS for _, variants in groups_of(world) for variant in variants}
    assert pairwise() < matrix and len(pairwise()) < 0.6 * len(matrix)
    assert set().union(*(pairs_of(*e) for e in pairwise())) == set().union(*(pairs_of(*e) for e in matrix))


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["pairwise", "full"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_layout_equals_one_rank(
    world: int, full: bool, reference: dict[tuple[str, str, str, str], Outcome]
) -> None:
    groups = selection_of(world, full=full)
    results = run_world(world, run_variants, groups)[0]
    assert len(results) == sum(len(variants) for _, variants in groups)
    worst = {"loss": 0.0, "norm": 0.0, "weight": 0.0}
    for variant, outcome in results:
        expected = reference[
            variant.trainable, variant.normalize, variant.ops, "masked" if variant.lengths == "cropped" else "equal"
        ]
        if variant.dtype == "bf16":
            assert max(abs(a - b) for a, b in zip(outcome.losses, expected.losses)) < BF16_LOSS, variant
            continue
        differences = require_equal(variant, outcome, expected)
        worst = {name: max(worst[name], difference) for name, difference in differences.items()}
    print(f"\n{world} ranks, {len(results)} variants: worst difference {worst}")


def test_losses_equal_the_golden_ones(reference: dict[tuple[str, str, str, str], Outcome]) -> None:
    """A code change must not change the mathematics. After an intended change, write the new losses into the file."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())
    for (trainable, normalize, ops, lengths), outcome in reference.items():
        if lengths != "equal":
            continue
        assert outcome.losses == pytest.approx(golden[f"{trainable}, {normalize}"], abs=GOLDEN_LOSS), (
            trainable,
            normalize,
            ops,
        )


@pytest.mark.parametrize("ops", OPS)
def test_frozen_parts_do_not_move(ops: str, reference: dict[tuple[str, str, str, str], Outcome]) -> None:
    """Only the selected parts train."""
    half, projector = (reference[part, "tokens", ops, "equal"].weights for part in ("half_tower", "projector"))
    moved = {key for key in half if not torch.equal(half[key], projector[key])}
    assert {
        "vision.layers.1.mlp.linear_fc1.weight",
        "language.head.weight",
        "language.decoder.layers.7.mlp.linear_fc2.weight",
    } <= moved
    assert not {key for key in moved if key.startswith("vision") and not key.startswith("vision.layers.1.")}

"""Every tower with every language model against transformers' LLaVA: features, logits, loss and all gradients.

18 pairs at one process; at other layouts, each tower and each language model once, and all pairs with -m matrix.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from harness import run_world
from hf_pairs import LANGUAGES, PAIRS, TOWERS, build_pair, model_config
from llava_reference import QUANTITIES, find_differences, write_reference
from tolerances import FP32_MODULE

from megatron_share4v.config.model import TrainableConfig
from megatron_share4v.config.parallel import ParallelConfig

LAYOUTS = {
    "tensor 2, sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline 2": ParallelConfig(pipeline=2),
    "tensor 2, pipeline 2": ParallelConfig(tensor=2, pipeline=2),
}


def pairs_at(number: int) -> list[str]:
    """Return pairs with every language model once, and every tower twice; each number shifts the towers."""
    towers = list(TOWERS)
    return [f"{towers[(place + number) % len(towers)]} x {language}" for place, language in enumerate(LANGUAGES)]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that transformers computes for each pair, in files."""
    folder, found = tmp_path_factory.mktemp("pairs"), {}
    for name in PAIRS:
        reference = build_pair(name)
        model = replace(model_config(reference), trainable=TrainableConfig(vision_from_block=-1))
        found[name] = write_reference(folder / f"{name}.pt", reference, model)
    return found


def compare(paths: dict[str, Path], parallel: ParallelConfig) -> dict[str, dict[str, float]]:
    """Return the largest relative differences by pair and quantity on this rank."""
    return {name: find_differences(path, parallel, "auto") for name, path in paths.items()}


def _check(paths: dict[str, Path], parallel: ParallelConfig) -> None:
    ranks = run_world(parallel.tensor * parallel.pipeline, compare, paths, parallel)
    worst = {
        (name, quantity): max(rank[name].get(quantity, 0.0) for rank in ranks)
        for name in paths
        for quantity in QUANTITIES
    }
    assert {quantity for rank in ranks for found in rank.values() for quantity in found} == set(QUANTITIES)
    large = {key: difference for key, difference in worst.items() if not difference <= FP32_MODULE}
    assert not large, large


def test_every_pair_equals_transformers(references: dict[str, Path]) -> None:
    _check(references, ParallelConfig())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_equal_transformers_at_other_layouts(layout: str, references: dict[str, Path]) -> None:
    chosen = pairs_at(list(LAYOUTS).index(layout))
    _check({name: references[name] for name in chosen}, LAYOUTS[layout])


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_pairs_equal_transformers_at_other_layouts(layout: str, references: dict[str, Path]) -> None:
    _check(references, LAYOUTS[layout])

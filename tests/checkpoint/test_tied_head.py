"""A tied head, copied to the last pipeline stage: one tensor in checkpoints, equal copies, resume and resharding."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import run_world
from small_run import Run, Setting, opened, stored_tensors
from tolerances import LAYOUT_LOSS, LAYOUT_NORM

HALF, WHOLE = 2, 4
MAIN = Setting(family="all", pipeline=2)
ROUNDED = replace(MAIN, dtype="bf16", moments="bf16", gradients="bf16")
RESHARDED = {
    "one stage": Setting(family="all"),
    "one stage, unsharded": Setting(family="all", tensor=2, distributed_optimizer=False),
    "interleaved": Setting(family="all", pipeline=2, virtual=2),
    "four stages": Setting(family="all", pipeline=4, distributed_optimizer=False),
}


def four_ranks(directory: Path) -> dict:
    """Run all checks in one world of two stages with two replicas."""
    results: dict = {}
    with opened(MAIN) as mesh:
        run, again = Run(mesh, MAIN, seed=1), Run(mesh, MAIN, seed=2)
        run.train(0, HALF)
        saved = run.save(directory / "two stages", HALF)
        again.load(saved)
        results["two stages"] = run.train(HALF, WHOLE)
        assert again.train(HALF, WHOLE) == results["two stages"]
        assert all(map(torch.equal, run.weights(), again.weights()))
        results["flipped"] = message_of_a_flipped_copy(run)
        rounded = Run(mesh, ROUNDED, seed=1)
        rounded.train(0, WHOLE)
        results["copies"] = tied_state(rounded)
    for name, setting in RESHARDED.items():
        with opened(setting) as mesh:
            run = Run(mesh, setting, seed=3)
            run.load(saved)
            run.save(directory / name, HALF)
            results[name] = run.train(HALF, WHOLE)
    with opened(MAIN) as mesh:  # and from one stage back to two
        run = Run(mesh, MAIN, seed=4)
        run.load(directory / "one stage" / saved.name)
        results["two stages again"] = run.train(HALF, WHOLE)
    return results


def message_of_a_flipped_copy(run: Run) -> str:
    """Flip a bit in both replicas of the last stage's copy, which only the comparison with the embedding finds."""
    from megatron_share4v.errors import DamageError
    from megatron_share4v.resilience.replica_checksum import check_replicas

    check_replicas(run.chunks, mesh=run.mesh, step=WHOLE)
    if run.mesh.is_last_stage:
        run.bare[-1].language.head.weight.data.view(torch.int32)[5, 7] ^= 1
    with pytest.raises(DamageError) as caught:
        check_replicas(run.chunks, mesh=run.mesh, step=WHOLE)
    return str(caught.value)


def tied_state(run: Run) -> dict[str, torch.Tensor]:
    """Return this rank's copy of the tied weight and the state of its shard."""
    from megatron_share4v.mcore.optimizer import chained_optimizers, optimizer_shards

    [shard] = [
        shard
        for part in chained_optimizers(run.optimizer)
        for shard in optimizer_shards(part)
        if getattr(shard.parameter, "shared_embedding", False)
    ]
    return {"weight": shard.parameter.detach().clone(), **{name: x.clone() for name, x in shard.tensors.items()}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tied")


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict]:
    return run_world(4, four_ranks, directory)


@pytest.mark.parametrize("name", RESHARDED)
def test_other_numbers_of_stages_read_the_same_state_and_go_on(name: str, ranks: list[dict], directory: Path) -> None:
    written, read = (stored_tensors(directory / folder / "step_00000002") for folder in ("two stages", name))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[key], read[key]) for key in written)
    for folder in (name, "two stages again"):
        for (loss, norm), (expected, expected_norm) in zip(ranks[0][folder], ranks[0]["two stages"], strict=True):
            assert abs(loss - expected) <= LAYOUT_LOSS and math.isclose(norm, expected_norm, rel_tol=LAYOUT_NORM)


def test_checkpoint_has_one_tensor(ranks: list[dict], directory: Path) -> None:
    names = stored_tensors(directory / "two stages" / "step_00000002").keys()
    assert "language.embedding.weight" in names and not [name for name in names if "language.head" in name]


def test_copies_stay_equal_under_stochastic_rounding(ranks: list[dict]) -> None:
    """Ranks 0 and 1 hold the replicas of the first stage, 2 and 3 those of the last."""
    for first, last in ((0, 2), (1, 3)):
        one, other = ranks[first]["copies"], ranks[last]["copies"]
        assert one["exp_avg_sq"].dtype is torch.bfloat16 and one["exp_avg_sq"].any()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_unequal_copies_are_found(ranks: list[dict]) -> None:
    assert re.search(
        r"after step 4 replicas do not hold the same weights: rank 0 \(.*\) in chunk0\.language\.embedding\.weight; "
        r"rank 2 \(.*\) in chunk0\.language\.head\.weight",
        ranks[1]["flipped"],
    ), ranks[1]["flipped"]

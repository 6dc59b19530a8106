"""Ranks that differ without failing: damaged weights and stragglers."""

from __future__ import annotations

import re

import pytest
import torch
from fault_injection import train
from launching import lines

from megatron_share4v.parallel.layout import Layout
from megatron_share4v.resilience.replica_checksum import RankChecksums, checksums, find_divergent_ranks
from megatron_share4v.resilience.straggler import RankTiming, find_slow_ranks, summarize

THREE = "train.global_batch_size=6"


def test_damaged_weight_is_named_and_not_saved(runs) -> None:
    directory = runs.root / "flipped"
    outcome = train(runs.config, 3, f"run.directory={directory}", THREE, faults="flip:1:5")
    assert outcome.codes[0] == 77 and "Traceback" not in outcome.output, outcome.output
    named = re.search(
        r"error: rank 0: after step 6 replicas do not hold the same weights: "
        r"rank 1 \(.*\) in chunk0.\S*class_embedding\. Take",
        outcome.output,
    )
    assert named, outcome.output
    assert sorted(path.name for path in (directory / "checkpoints").glob("step_*")) == ["step_00000003"]
    outcome = train(
        runs.config, 3, f"run.directory={directory}", THREE, "parallel.check_replicas_every_steps=5", faults="flip:1:4"
    )
    assert outcome.codes[0] == 77 and "after step 5 replicas" in outcome.output, outcome.output


def test_slow_rank_is_named(runs) -> None:
    directory = runs.root / "slow"
    outcome = train(
        runs.config,
        3,
        f"run.directory={directory}",
        THREE,
        "log.ranks_every_steps=4",
        "log.tensorboard=true",
        faults="slow:2:5:0.3",
    )
    assert outcome.codes == [0, 0, 0], outcome.output
    assert re.search(
        r"step 8: rank 2 is slow: it computes its forward passes for 0\.[6-9]\d* s per step, the others", outcome.output
    ), outcome.output
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("ranks/forward_s/of_rank")][-1] == (8, 2.0)
    assert len(lines(directory / "metrics.jsonl")) == 8


def test_slow_ranks_are_found_within_their_stage() -> None:
    layout = Layout(data=3, pipeline=2)
    even = [RankTiming(1.0, 0.0, 4.0)] * 3 + [RankTiming(2.0, 0.0, 4.0)] * 3
    assert find_slow_ranks(even, layout, factor=1.5) == []
    one = [*even[:4], RankTiming(3.1, 0.0, 4.0), even[5]]
    assert find_slow_ranks(one, layout, factor=1.5) == [
        "rank 4 is slow: it computes its forward passes for 3.100 s per step, the others of its stage for 2.000 s"
    ]
    waits = [RankTiming(1.0, 0.5, 4.0), *even[1:]]
    assert find_slow_ranks(waits, layout, factor=1.5) == [
        "rank 0 is slow: it waits for data for 0.500 s per step, the others of its stage for 0.000 s"
    ]
    assert find_slow_ranks([RankTiming(1.0, 0.1, 4.0), *even[1:]], layout, factor=1.5) == [], (
        "a difference below the threshold is not reported"
    )
    assert find_slow_ranks([RankTiming(9.0, 9.0, 9.0)], Layout(), factor=1.5) == []
    assert (
        summarize(one)["forward_s/largest"] == 3.1
        and summarize(one)["forward_s/of_rank"] == 4.0
        and summarize(one)["forward_s/median"] == 1.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_depends_on_every_bit_and_on_order(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(40, 30, bias=False).to(dtype)
    before = checksums([module])["chunk0.weight"].clone()
    assert torch.equal(before, checksums([module])["chunk0.weight"])
    words = module.weight.data.view(torch.int16 if dtype is torch.bfloat16 else torch.int32).view(-1)
    for bit in range(0, 8 * dtype.itemsize - 1, 5):
        words[777] ^= 1 << bit
        assert not torch.equal(before, checksums([module])["chunk0.weight"])
        words[777] ^= 1 << bit
    words[[3, 4]] = words[[4, 3]]
    after = checksums([module])["chunk0.weight"]
    assert after[0] == before[0] and after[1] != before[1]


def test_divergent_ranks_are_found_by_majority() -> None:
    good, bad = RankChecksums("a", {"w": (1, 1), "v": (2, 2)}), RankChecksums("b", {"w": (1, 3), "v": (2, 2)})
    assert find_divergent_ranks([good, bad, good], Layout(data=3)) == ["rank 1 (b) in w"]
    assert find_divergent_ranks([good, bad], Layout(data=2)) == ["rank 0 (a) in w", "rank 1 (b) in w"]
    # With tensor 2 x data 2 the DP groups are ranks 0, 2 and ranks 1, 3.
    assert find_divergent_ranks([good, bad, good, bad], Layout(data=2, tensor=2)) == []
    assert find_divergent_ranks([good, bad, good, good], Layout(data=2, tensor=2)) == [
        "rank 1 (b) in w",
        "rank 3 (a) in w",
    ]

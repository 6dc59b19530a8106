"""Hang diagnosis: find the rank that differs from the recorded states of all ranks, without processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_share4v.resilience.hang_diagnosis import ObservedRank, diagnose
from megatron_share4v.resilience.rank_state import RankState, locate_frame

WAITING = RankState(
    rank=0,
    host="a",
    pid=1,
    born=1,
    beat=9,
    step=7,
    phase="compute",
    micro_batch=2,
    since_s=50.0,
    where="train/step.py:9 _reduce",
    collective="all_reduce",
)


def make_ranks(*odd: tuple[int, dict], size: int = 4) -> list[ObservedRank]:
    """Return ranks that all wait in the same collective, with the changes `odd` by rank."""
    changes = dict(odd)
    return [ObservedRank(rank, replace(WAITING, rank=rank, **changes.get(rank, {})), True, "S") for rank in range(size)]


@pytest.mark.parametrize(
    ("seen", "ranks", "cause"),
    [
        (make_ranks((2, {"collective": ""})), (2,), "it computes, or something outside torch.distributed"),
        (make_ranks((2, {"collective": "", "phase": "data"})), (2,), "it waits for its samples"),
        (make_ranks((1, {"step": 6})), (1,), "it is behind the others, in all_reduce"),
        (make_ranks((3, {"micro_batch": 1})), (3,), "it is behind the others"),
        (make_ranks((0, {"collective": "broadcast"})), (0,), "it waits in broadcast"),
        (
            make_ranks((1, {"ended": "ValueError: x", "code": 1}), (2, {"collective": ""})),
            (1,),
            "it has ended: ValueError: x",
        ),
        (make_ranks((1, {"ended": "", "code": 0})), (1,), "it completed while others continue"),
        (make_ranks(), (), "all ranks wait in all_reduce (train/step.py:9 _reduce) and none differs: the network"),
        (make_ranks(*((rank, {"collective": ""}) for rank in range(4))), (), "no rank waits for another"),
    ],
)
def test_rank_that_differs(seen: list[ObservedRank], ranks: tuple[int, ...], cause: str) -> None:
    found = diagnose(seen)
    assert found.ranks == ranks and cause in found.cause and found.silent == ()


@pytest.mark.parametrize(
    ("letter", "cause"),
    [
        ("T", "is stopped"),
        ("D", "waits for a disk or a driver"),
        ("gone", "is gone"),
        ("", "nor its host responds"),
        ("R", "into C holds the interpreter lock"),
    ],
)
def test_silent_ranks_come_first(letter: str, cause: str) -> None:
    seen = make_ranks((2, {"collective": ""}))
    seen[1] = replace(seen[1], alive=False, letter=letter)
    found = diagnose(seen)
    assert (
        found.ranks == found.silent == (1,)
        and cause in found.cause
        and "last seen at step 7, compute, micro-batch 2" in found.cause
    )


def test_rank_without_a_state_is_named() -> None:
    found = diagnose([*make_ranks()[:3], ObservedRank(3, None, False)])
    assert found.ranks == (3,) and "has never written its state" in found.cause


def test_locate_frame_finds_no_package_frame_outside_the_package() -> None:
    assert locate_frame(None) == ("", "")
    import sys

    assert locate_frame(sys._getframe()) == ("", ""), "pytest and this test are not part of the package"

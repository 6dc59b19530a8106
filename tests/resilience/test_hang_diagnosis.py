"""From where each rank stands to the one that differs, without processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_share4v.resilience.hang_diagnosis import ObservedRank, diagnose
from megatron_share4v.resilience.rank_state import RankState, locate_frame

WAITING = RankState(
    rank=0, host="a", pid=1, born=1, beat=9, step=7, phase="compute", micro_batch=2, since_s=50.0, where="train/step.py:9 _reduce", collective="all_reduce"
)  # fmt: skip


def world(*odd: tuple[int, dict], size: int = 4) -> list[ObservedRank]:
    """All wait in the same place but for `odd`."""
    changes = dict(odd)
    return [ObservedRank(rank, replace(WAITING, rank=rank, **changes.get(rank, {})), True, "S") for rank in range(size)]


@pytest.mark.parametrize(
    ("seen", "ranks", "cause"),
    [
        (world((2, {"collective": ""})), (2,), "it computes, or something outside torch.distributed"),
        (world((2, {"collective": "", "phase": "data"})), (2,), "it waits for its samples"),
        (world((1, {"step": 6})), (1,), "it is behind the others, in all_reduce"),
        (world((3, {"micro_batch": 1})), (3,), "it is behind the others"),
        (world((0, {"collective": "broadcast"})), (0,), "it waits in broadcast"),
        (
            world((1, {"ended": "ValueError: x", "code": 1}), (2, {"collective": ""})),
            (1,),
            "it has ended: ValueError: x",
        ),
        (world((1, {"ended": "", "code": 0})), (1,), "it completed while others continue"),
        (world(), (), "all ranks wait in all_reduce (train/step.py:9 _reduce) and none differs: the network"),
        (world(*((rank, {"collective": ""}) for rank in range(4))), (), "no rank waits for another"),
    ],
)
def test_who_differs(seen: list[ObservedRank], ranks: tuple[int, ...], cause: str) -> None:
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
    seen = world((2, {"collective": ""}))
    seen[1] = replace(seen[1], alive=False, letter=letter)
    found = diagnose(seen)
    assert (
        found.ranks == found.silent == (1,)
        and cause in found.cause
        and "last seen at step 7, compute, micro-batch 2" in found.cause
    )


def test_a_rank_that_never_spoke() -> None:
    found = diagnose([*world()[:3], ObservedRank(3, None, False)])
    assert found.ranks == (3,) and "has never written its state" in found.cause


def test_where_a_thread_stands() -> None:
    assert locate_frame(None) == ("", "")
    import sys

    assert locate_frame(sys._getframe()) == ("", ""), "pytest and this test are none of the package"

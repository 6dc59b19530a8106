"""Ordered map over worker processes: order, errors, and workers that crash or hang, once or always."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_share4v.data.loading.workers import ordered_map
from megatron_share4v.errors import DataError


def square(request: int) -> tuple[int, torch.Tensor]:
    if request == 13:
        raise DataError("13 is not read")
    if request == 17:
        raise ZeroDivisionError("a bug")
    return request**2, torch.full((3, 1 << 16), request, dtype=torch.uint8)


class Fragile:
    """Function that squares; at some requests it kills its process or sleeps, the first time or always."""

    def __init__(self, notes: Path, *, victims: dict[int, str]) -> None:
        self.notes, self.victims = notes, victims

    def __call__(self, request: int) -> int:
        kind = self.victims.get(request)
        note = self.notes / str(request)
        if kind is not None and (kind.endswith("always") or not note.exists()):
            note.touch()
            if kind.startswith("hang"):
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL) if kind.startswith("kill") else os._exit(7)
        return request**2


class Unloadable:
    """Function that cannot be unpickled, so that the worker never starts."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import os; os._exit(5)",)


def test_workers_that_cannot_begin_end_the_reading() -> None:
    """A worker that cannot start fails once, not once per request."""
    with pytest.raises(DataError, match="ended with exit code 5 during start-up, also after a restart"):
        next(ordered_map(Unloadable(), range(10**6), num_workers=2, prefetch=2, on_crash=given_up))


def given_up(request: int, reason: str) -> tuple[int, str]:
    return request, reason


@pytest.mark.parametrize("num_workers, prefetch", [(0, 1), (1, 1), (3, 2)])
def test_results_come_in_order(num_workers: int, prefetch: int) -> None:
    results = list(ordered_map(square, range(11), num_workers=num_workers, prefetch=prefetch))
    assert [result[0] for result in results] == [n**2 for n in range(11)]
    assert all(
        torch.equal(result[1], torch.full((3, 1 << 16), n, dtype=torch.uint8)) for n, result in enumerate(results)
    )
    assert list(ordered_map(square, [], num_workers=num_workers, prefetch=prefetch)) == []


def test_errors_arrive_at_their_place() -> None:
    stream = ordered_map(square, [11, 13, 12, 17], num_workers=2, prefetch=2)
    assert next(stream)[0] == 121
    with pytest.raises(DataError, match="^13 is not read$"):
        next(stream)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        list(ordered_map(square, [17], num_workers=1, prefetch=1))


def test_dead_and_hung_workers_go_on_at_the_same_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fragile = Fragile(tmp_path, victims={0: "kill", 3: "exit", 4: "hang", 7: "kill"})
    with caplog.at_level("WARNING", logger="megatron_share4v"):
        results = list(ordered_map(fragile, range(12), num_workers=2, prefetch=3, timeout_s=4.0, on_crash=given_up))
    assert results == [n**2 for n in range(12)]
    # The order in which crashes are detected depends on the progress of each process.
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4 and all("restarted at the same request" in line for line in told)
    for who, how, times in (
        (0, "killed by SIGKILL", 1),
        (1, "ended with exit code 7", 1),
        (0, "hangs: no result for 4 s", 1),
        (1, "killed by SIGKILL", 1),
    ):
        assert sum(f"reader process {who} (pid " in line and how in line for line in told) == times, told


def test_work_that_always_kills_is_given_up(tmp_path: Path) -> None:
    fragile = Fragile(tmp_path, victims={2: "kill always", 3: "hang always", 5: "exit"})
    results = list(ordered_map(fragile, range(8), num_workers=2, prefetch=2, timeout_s=4.0, on_crash=given_up))
    assert [result for n, result in enumerate(results) if n not in (2, 3)] == [
        n**2 for n in range(8) if n not in (2, 3)
    ]
    assert results[2][0] == 2 and "killed by SIGKILL" in results[2][1]
    assert results[3][0] == 3 and "hangs" in results[3][1]
    with pytest.raises(DataError, match="killed by SIGKILL, 2 times on the same request: 2"):
        list(ordered_map(fragile, range(4), num_workers=1, prefetch=4))

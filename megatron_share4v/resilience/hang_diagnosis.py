"""Why a job hangs: from where each rank stands to the ranks that differ and the likely cause."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_share4v.files import atomic_write_json
from megatron_share4v.logging import get_logger
from megatron_share4v.parallel.process import process_status
from megatron_share4v.resilience.rank_state import RankState, read_state

REPORT, TEXT = "report.json", "report.txt"
LISTED = 64
# In the order of a step; what is not here comes after.
PHASES = ("start", "data", "compute", "after")
CAUSES = {
    "data": "it waits for its samples: a loader process or the file system",
    "save": "it writes a checkpoint: the file system",
    "build": "it builds or loads: the file system, or the compiler",
}


@dataclass(frozen=True)
class Seen:
    """A rank as another one sees it. state None: it has never said anything; letter: of its process in /proc, "" on another host."""

    rank: int
    state: RankState | None
    lives: bool
    letter: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The ranks that differ, those that answer no more among them, and what is likely wrong."""

    ranks: tuple[int, ...]
    silent: tuple[int, ...]
    cause: str


def look(folder: Path, *, ranks: int, wait_s: float) -> list[Seen]:
    """All ranks, and whether they have moved a beat within `wait_s` seconds. No clocks of two hosts are compared."""
    before = [read_state(folder, rank) for rank in range(ranks)]
    time.sleep(wait_s)
    return [_seen(folder, rank, before[rank]) for rank in range(ranks)]


def lives(before: RankState | None, now: RankState | None) -> bool:
    """Whether a rank has moved."""
    return now is not None and (before is None or now.beat > before.beat)


def _seen(folder: Path, rank: int, before: RankState | None) -> Seen:
    state = read_state(folder, rank)
    if state is None or state.host != socket.gethostname():
        return Seen(rank, state, lives(before, state))
    status = process_status(state.pid)
    return Seen(rank, state, lives(before, state), status[0] if status and status[1] == state.born else "gone")


def diagnose(seen: Sequence[Seen]) -> Diagnosis:
    """Who keeps the others waiting: the first of these that finds anybody.

    Ranks that ended, that never began, that answer no more; that are in no collective while others wait in one; that are behind; that wait in
    another collective than most.
    """
    ended = [one for one in seen if one.state is not None and one.state.ended is not None]
    silent = tuple(one.rank for one in seen if not one.lives and one not in ended)
    states = [one.state for one in seen if one.lives and one.state is not None and one not in ended]
    if ended:
        return Diagnosis(
            _ranks(ended), silent, f"it has ended: {ended[0].state.ended or 'it came to its end while others go on'}"
        )
    if silent:
        return Diagnosis(silent, silent, _silence(seen[silent[0]]))
    free = [state for state in states if not state.collective]
    if free and len(free) < len(states):
        cause = CAUSES.get(free[0].phase, "it computes, or something outside torch.distributed does not return")
        return Diagnosis(
            _ranks(free), (), f"{cause}; it is in {free[0].where or 'code that is not ours'} and the others wait for it"
        )
    behind = [state for state in states if _order(state) == min(map(_order, states))]
    if len(behind) < len(states):
        return Diagnosis(
            _ranks(behind),
            (),
            f"it is behind the others, in {behind[0].collective or behind[0].where}: it waits for a message that is not sent",
        )
    usual = Counter((state.collective, state.where) for state in states).most_common(1)[0][0]
    odd = [state for state in states if (state.collective, state.where) != usual]
    if odd:
        return Diagnosis(
            _ranks(odd),
            (),
            f"it waits in {odd[0].collective or 'no collective'} ({odd[0].where}), most others in {usual[0]} ({usual[1]})",
        )
    if not usual[0]:
        return Diagnosis(
            (),
            (),
            f"no rank waits for another: all are in {usual[1]}; the bound is too low, or all wait for the same disk or device",
        )
    return Diagnosis(
        (), (), f"all ranks wait in {usual[0]} ({usual[1]}) and none differs: the network between them, or a switch"
    )


def _ranks(found: Sequence[Seen] | Sequence[RankState]) -> tuple[int, ...]:
    return tuple(one.rank for one in found)


def _order(state: RankState) -> tuple[int, int, int]:
    return state.step, PHASES.index(state.phase) if state.phase in PHASES else len(PHASES), state.micro_batch


def _silence(one: Seen) -> str:
    if one.state is None:
        return "it has never said anything: it did not start, or does not see the run directory"
    words = {
        "T": "its process is stopped (SIGSTOP, or a debugger)",
        "D": "its process waits for a disk or a driver and cannot even be ended (state D)",
        "gone": "its process is gone: killed, by the kernel where memory is short",
        "": "neither its process nor its host answers, or it does not see the run directory any more",
    }
    return f"{words.get(one.letter, 'its interpreter does not run: something in C holds its lock')}; last seen at {one.state.position}"


def report(folder: Path, *, ranks: int, reason: str, seen: Sequence[Seen]) -> None:
    """Write report.txt and report.json, and say in the log what is in them."""
    found = diagnose(seen)
    hosts = {one.rank: one.state.host for one in seen if one.state is not None}
    who = (
        ", ".join(f"rank {rank} ({hosts.get(rank, 'host unknown')})" for rank in found.ranks[:LISTED])
        or "no single rank"
    )
    headline = f"the job hangs: {reason}. Differs: {who}. Likely cause: {found.cause}"
    shown = list(seen) if ranks <= LISTED else [one for one in seen if one.rank in found.ranks][:LISTED]
    listed = "\n".join(_line(one, found) for one in shown)
    events = "\n".join(f"rank {one.rank}: {'; '.join(one.state.events)}" for one in shown if one.state is not None)
    text = f"{headline}\n\n{listed}\n\nLast events:\n{events}\n\nStacks: rank<N>.stacks.txt beside this file, of all ranks that could still write them.\n"
    (folder / TEXT).write_text(text, encoding="utf-8")
    atomic_write_json(folder / REPORT, {"reason": reason, "headline": headline, **asdict(found)})
    get_logger().error("%s. All ranks: %s", headline, folder / TEXT)


def _line(one: Seen, found: Diagnosis) -> str:
    mark = "->" if one.rank in found.ranks else "  "
    if one.state is None:
        return f"{mark} rank {one.rank}: nothing heard"
    state = one.state
    doing = f"waits in {state.collective}" if state.collective else "waits for no other rank"
    silent = "" if one.lives else f" [silent, process state {one.letter or 'unknown'}]"
    return f"{mark} rank {one.rank} ({state.host}, pid {state.pid}): {state.position}, for {state.since_s:.1f} s, {doing}, {state.where}{silent}"


def end_silent(folder: Path, silent: Sequence[int]) -> None:
    """Kill the silent ranks of this host. A stopped process does not hear SIGTERM, and the launcher would wait half a minute for it."""
    for rank in silent:
        state = read_state(folder, rank)
        if (
            state is not None
            and state.host == socket.gethostname()
            and (status := process_status(state.pid))
            and status[1] == state.born
        ):
            os.kill(state.pid, signal.SIGKILL)

"""Diagnosis of a hang: from the states of all ranks to the ranks that differ and the likely cause."""

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
SHOWN_RANKS = 64
PHASES = ("start", "data", "compute", "after")
"""Phases in the order of a step; any other phase comes after them."""
PHASE_CAUSES = {
    "data": "it waits for its samples: a loader process or the file system",
    "save": "it writes a checkpoint: the file system",
    "build": "it builds or loads: the file system, or the compiler",
}
PROCESS_CAUSES = {
    "T": "its process is stopped (SIGSTOP, or a debugger)",
    "D": "its process waits for a disk or a driver and cannot even be killed (state D)",
    "gone": "its process is gone: killed, by the kernel when memory is short",
    "": "neither its process nor its host responds, or it cannot access the run directory any more",
}


@dataclass(frozen=True)
class ObservedRank:
    """A rank as another rank observes it."""

    rank: int
    state: RankState | None
    """None when the rank has never written a state."""
    alive: bool
    """Whether its heartbeat advanced during the observation."""
    letter: str = ""
    """State of its process in /proc, "gone" when there is none; empty on another host."""


@dataclass(frozen=True)
class Diagnosis:
    """The ranks that differ, the silent ones among them, and the likely cause; fields are keys of report.json."""

    ranks: tuple[int, ...]
    silent: tuple[int, ...]
    cause: str


def observe_ranks(folder: Path, *, ranks: int, wait_s: float) -> list[ObservedRank]:
    """Observe all ranks for `wait_s` seconds; clocks of different hosts are not compared."""
    before = [read_state(folder, rank) for rank in range(ranks)]
    time.sleep(wait_s)
    return [_observe(folder, rank, before[rank]) for rank in range(ranks)]


def has_advanced(before: RankState | None, now: RankState | None) -> bool:
    """Return whether the heartbeat of a rank advanced between two readings."""
    return now is not None and (before is None or now.beat > before.beat)


def _observe(folder: Path, rank: int, before: RankState | None) -> ObservedRank:
    state = read_state(folder, rank)
    alive = has_advanced(before, state)
    if state is None or state.host != socket.gethostname():
        return ObservedRank(rank, state, alive)
    status = process_status(state.pid)
    return ObservedRank(rank, state, alive, status[0] if status and status[1] == state.born else "gone")


def diagnose(observed: Sequence[ObservedRank]) -> Diagnosis:
    """Find the ranks that block the others, by the first of these rules that matches any rank.

    Ranks that ended; ranks without a heartbeat; ranks outside a collective while others wait in one; ranks behind the
    others; ranks that wait in another collective than most.
    """
    ended = [(one.rank, one.state) for one in observed if one.state is not None and one.state.ended is not None]
    ended_ranks = tuple(rank for rank, _ in ended)
    silent = tuple(one.rank for one in observed if not one.alive and one.rank not in ended_ranks)
    if ended:
        error = ended[0][1].ended or "it completed while others continue"
        return Diagnosis(ended_ranks, silent, f"it has ended: {error}")
    if silent:
        return Diagnosis(silent, silent, _silence_cause(observed[silent[0]]))
    return _diagnose_waits([one.state for one in observed if one.alive and one.state is not None])


def _diagnose_waits(states: Sequence[RankState]) -> Diagnosis:
    """Apply the rules for ranks that all have a heartbeat."""
    free = [state for state in states if not state.collective]
    if free and len(free) < len(states):
        cause = PHASE_CAUSES.get(free[0].phase, "it computes, or something outside torch.distributed does not return")
        where = free[0].where or "code outside this project"
        return Diagnosis(_ranks(free), (), f"{cause}; it is in {where} and the others wait for it")
    behind = [state for state in states if _progress(state) == min(map(_progress, states))]
    if len(behind) < len(states):
        where = behind[0].collective or behind[0].where
        cause = f"it is behind the others, in {where}: it waits for a message that is not sent"
        return Diagnosis(_ranks(behind), (), cause)
    usual = Counter((state.collective, state.where) for state in states).most_common(1)[0][0]
    odd = [state for state in states if (state.collective, state.where) != usual]
    if odd:
        own = f"{odd[0].collective or 'no collective'} ({odd[0].where})"
        return Diagnosis(_ranks(odd), (), f"it waits in {own}, most others in {usual[0]} ({usual[1]})")
    if not usual[0]:
        cause = "the bound is too low, or all wait for the same disk or device"
        return Diagnosis((), (), f"no rank waits for another: all are in {usual[1]}; {cause}")
    where = f"{usual[0]} ({usual[1]})"
    cause = f"all ranks wait in {where} and none differs: the network between them, or a switch"
    return Diagnosis((), (), cause)


def _ranks(states: Sequence[RankState]) -> tuple[int, ...]:
    return tuple(state.rank for state in states)


def _progress(state: RankState) -> tuple[int, int, int]:
    return state.step, PHASES.index(state.phase) if state.phase in PHASES else len(PHASES), state.micro_batch


def _silence_cause(one: ObservedRank) -> str:
    if one.state is None:
        return "it has never written its state: it did not start, or cannot access the run directory"
    cause = PROCESS_CAUSES.get(one.letter, "its Python threads do not run: a call into C holds the interpreter lock")
    return f"{cause}; last seen at {one.state.position}"


def write_report(folder: Path, *, ranks: int, reason: str, observed: Sequence[ObservedRank]) -> None:
    """Write report.txt and report.json, and log the headline."""
    found = diagnose(observed)
    hosts = {one.rank: one.state.host for one in observed if one.state is not None}
    who = ", ".join(f"rank {rank} ({hosts.get(rank, 'host unknown')})" for rank in found.ranks[:SHOWN_RANKS])
    headline = f"the job hangs: {reason}. Differs: {who or 'no single rank'}. Likely cause: {found.cause}"
    shown = list(observed)
    if ranks > SHOWN_RANKS:
        shown = [one for one in observed if one.rank in found.ranks][:SHOWN_RANKS]
    lines = [headline, "", *(_describe(one, found) for one in shown), "", "Last events:"]
    lines += [f"rank {one.rank}: {'; '.join(one.state.events)}" for one in shown if one.state is not None]
    lines += ["", "Stacks: rank<N>.stacks.txt beside this file, of all ranks that could still write them.", ""]
    (folder / TEXT).write_text("\n".join(lines), encoding="utf-8")
    atomic_write_json(folder / REPORT, {"reason": reason, "headline": headline, **asdict(found)})
    get_logger().error("%s. All ranks: %s", headline, folder / TEXT)


def _describe(one: ObservedRank, found: Diagnosis) -> str:
    mark = "->" if one.rank in found.ranks else "  "
    if one.state is None:
        return f"{mark} rank {one.rank}: no state written"
    state = one.state
    who = f"rank {state.rank} ({state.host}, pid {state.pid})"
    doing = f"waits in {state.collective}" if state.collective else "waits for no other rank"
    silent = "" if one.alive else f" [silent, process state {one.letter or 'unknown'}]"
    return f"{mark} {who}: {state.position}, for {state.since_s:.1f} s, {doing}, {state.where}{silent}"


def kill_silent_ranks(folder: Path, silent: Sequence[int]) -> None:
    """Kill the silent ranks of this host.

    A stopped process does not receive SIGTERM, and the launcher would wait half a minute before it sends SIGKILL.
    """
    for rank in silent:
        state = read_state(folder, rank)
        if state is None or state.host != socket.gethostname():
            continue
        status = process_status(state.pid)
        if status is not None and status[1] == state.born:
            os.kill(state.pid, signal.SIGKILL)

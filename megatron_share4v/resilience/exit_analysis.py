"""Why a job ended, from the rank states in watch/: which rank failed first, where, and whether a restart can help."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.exit_codes import ExitCode
from megatron_share4v.files import read_text
from megatron_share4v.resilience.error_report import PEER_LOST_MESSAGES
from megatron_share4v.resilience.hang_diagnosis import REPORT
from megatron_share4v.resilience.heartbeat import FOLDER
from megatron_share4v.resilience.rank_state import RankState, read_states

KILLED_EARLIER_BEATS = 4
"""A rank that was killed as a cause stopped this many heartbeats before the ranks that the launcher killed after it."""
SHOWN_RANKS = 16
STEP_PHASES = ("data", "compute")
"""Phases in which the samples of a step can end the process."""


@dataclass(frozen=True)
class ExitAnalysis:
    """How a job ended; the fields are keys of restarts.jsonl."""

    reason: str
    code: int | None
    """Exit code of the first cause; None when a rank was killed."""
    step: int = 0
    """Step in progress (1-based); 0 before the first."""
    of_step: bool = False
    """Whether it ended within a step, not while building, saving or validating."""

    @property
    def restart_can_help(self) -> bool:
        """Whether a restart can help: the run neither finished, nor was stopped, nor needs its user."""
        return self.code not in (ExitCode.OK, ExitCode.USER_ERROR, ExitCode.STOPPED)


COMPLETED = ExitAnalysis("all ranks completed", ExitCode.OK)


def analyze_exit(run: Path) -> ExitAnalysis:
    """Analyze the states that the ranks of the last job left in this run directory, once no rank is alive.

    Order of causes: a hang report, a user error, a killed rank (its peers failed because of it), any other exception.
    """
    states = read_states(run / FOLDER)
    if not states:
        return ExitAnalysis("no rank has started; the messages of the launcher are above", None)
    report = run / FOLDER / REPORT
    if report.exists():
        content = json.loads(read_text(report))
        culprits = [state for state in states if state.rank in content["ranks"]] or states
        return _analysis(culprits[0], content["headline"], ExitCode.HUNG)
    # A rank that lost a peer is not a cause.
    failed = sorted((state for state in states if state.ended), key=_lost_peer)
    explained = [state for state in failed if state.code != ExitCode.FAILURE]
    if explained:
        return _analysis(explained[0], f"rank {explained[0].rank}: {explained[0].ended}", explained[0].code)
    killed = [state for state in states if state.ended is None]
    if killed:
        newest = max(state.beat for state in states)
        killed = [state for state in killed if state.beat < newest - KILLED_EARLIER_BEATS] or killed
        who = ", ".join(f"{state.rank} ({state.host}, pid {state.pid})" for state in killed[:SHOWN_RANKS])
        reason = f"killed without an error report (kill -9, out of memory): rank {who}, at {killed[0].position}"
        return _analysis(killed[0], reason, None)
    if failed:
        return _analysis(failed[0], f"rank {failed[0].rank}: {failed[0].ended}", ExitCode.FAILURE)
    return COMPLETED


def _lost_peer(state: RankState) -> bool:
    return any(message in str(state.ended) for message in PEER_LOST_MESSAGES)


def _analysis(state: RankState, reason: str, code: int | None) -> ExitAnalysis:
    return ExitAnalysis(reason, code, state.step, state.phase in STEP_PHASES)

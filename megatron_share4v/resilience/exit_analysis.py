"""Why a job has ended, from what its ranks have left in watch/: which rank failed first, where, and whether starting again can help."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.exit_codes import ExitCode
from megatron_share4v.resilience.error_report import CONSEQUENCES
from megatron_share4v.resilience.hang_diagnosis import REPORT
from megatron_share4v.resilience.heartbeat import FOLDER
from megatron_share4v.resilience.rank_state import RankState, read_states

LATER_BEATS, LISTED = 4, 16
# Where the samples of a step can be what ends a process.
OF_A_STEP = ("data", "compute")


@dataclass(frozen=True)
class ExitAnalysis:
    """How a job ended. code: that of its first cause, None where a rank died without a word; step: which was being made, 0: none."""

    reason: str
    code: int | None
    step: int = 0
    of_step: bool = False
    """It happened while a step was made, not while something was built, saved or validated."""

    @property
    def goes_on(self) -> bool:
        """Starting again can help: it was neither asked to end nor does a user have to do something."""
        return self.code not in (ExitCode.OK, ExitCode.USER_ERROR, ExitCode.STOPPED)


def examine(run: Path) -> ExitAnalysis:
    """What the ranks of the job in this run directory have left. Call it when none of them lives any more.

    Ranks that died without a word come first: the others have failed because of them. Then errors that a user can understand, then others.
    """
    states = read_states(run / FOLDER)
    if not states:
        return ExitAnalysis("no rank has begun; what the launcher said is above", None)
    report = run / FOLDER / REPORT
    if report.exists():
        content = json.loads(report.read_text(encoding="utf-8"))
        behind = [state for state in states if state.rank in content["ranks"]] or states
        return _of(behind[0], content["headline"], ExitCode.HUNG)
    dead = [state for state in states if state.ended is None]
    # One that failed because its peers were gone is no cause.
    failed = sorted(
        (state for state in states if state.ended),
        key=lambda state: any(sign in str(state.ended) for sign in CONSEQUENCES),
    )
    told = [state for state in failed if state.code != 1]
    if told:
        return _of(told[0], f"rank {told[0].rank}: {told[0].ended}", told[0].code)
    if dead:
        # Ranks that the launcher has killed because of others lived on for some beats.
        newest = max(state.beat for state in states)
        dead = [state for state in dead if state.beat < newest - LATER_BEATS] or dead
        who = ", ".join(f"{state.rank} ({state.host}, pid {state.pid})" for state in dead[:LISTED])
        return _of(
            dead[0],
            f"died without a word, as by kill -9 or for want of memory: rank {who}, at {dead[0].position}",
            None,
        )
    if failed:
        return _of(failed[0], f"rank {failed[0].rank}: {failed[0].ended}", 1)
    return ExitAnalysis("all ranks came to their end", 0)


def _of(state: RankState, reason: str, code: int | None) -> ExitAnalysis:
    return ExitAnalysis(reason, code, state.step, state.phase in OF_A_STEP)

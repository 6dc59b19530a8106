"""The state of one rank in files that other processes can read: `watch/rank<N>.json` and `.place` in the run directory.

Written by heartbeat.py, read by hang_diagnosis.py and the supervisor.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from megatron_share4v.files import atomic_write_json, read_text

PACKAGE = f"{os.sep}megatron_share4v{os.sep}"
_TORCH_COLLECTIVES = f"torch{os.sep}distributed{os.sep}distributed_c10d.py"
_CORE_WAITS = ("p2p_communication.py", "param_and_grad_buffer.py")
"""Files of megatron-core that wait for asynchronous collectives and point-to-point operations."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """State of one rank; the fields are the keys of rank<N>.json."""

    rank: int
    host: str
    pid: int
    born: int
    """Start time of the process in clock ticks; tells it from a later process with the same pid."""
    beat: int
    """Number of heartbeats so far."""
    step: int
    """Step in progress, 1-based; 0 before the first."""
    phase: str
    micro_batch: int
    """Micro-batch in progress, 0-based; -1 before the first of the step."""
    since_s: float
    """Seconds in this phase and micro-batch."""
    where: str
    """Innermost line of this project on the stack of the main thread."""
    collective: str
    """Function of torch.distributed or megatron-core that waits for other ranks; empty when none does."""
    ended: str | None = None
    """None while the rank runs, empty when it completed, else the error that ended it."""
    code: int | None = None
    """Exit code; None while the rank runs."""
    events: list[str] = field(default_factory=list)
    """Last phases entered, with their time of day."""

    @property
    def position(self) -> str:
        """Step, phase and micro-batch, for messages."""
        micro_batch = f", micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"step {self.step}, {self.phase}{micro_batch}"


class MappedPosition:
    """Step, phase and micro-batch of a rank in a memory-mapped file: cheap to set, and kept when the rank is killed."""

    _LAYOUT = struct.Struct("<qq32s")  # step, micro-batch, phase

    def __init__(self, folder: Path, rank: int) -> None:
        with open(folder / f"rank{rank}.place", "w+b") as file:
            file.write(bytes(self._LAYOUT.size))
            file.flush()
            self._memory = mmap.mmap(file.fileno(), self._LAYOUT.size)

    def set(self, *, step: int, phase: str, micro_batch: int) -> None:
        """Store the position."""
        self._LAYOUT.pack_into(self._memory, 0, step, micro_batch, phase.encode())

    @classmethod
    def read(cls, folder: Path, rank: int) -> dict[str, int | str]:
        """Read the fields of RankState that the file overrides; empty when the rank has not set a position."""
        path = folder / f"rank{rank}.place"
        content = path.read_bytes() if path.exists() else b""
        if len(content) != cls._LAYOUT.size or not any(content):
            return {}
        step, micro_batch, phase = cls._LAYOUT.unpack(content)
        return {"step": step, "micro_batch": micro_batch, "phase": phase.rstrip(b"\0").decode()}


def write_state(folder: Path, state: RankState) -> None:
    """Replace rank<N>.json atomically."""
    atomic_write_json(folder / f"rank{state.rank}.json", asdict(state))


def read_state(folder: Path, rank: int) -> RankState | None:
    """Read the state of a rank, with the position from its mapped file; None when the rank has not started."""
    path = folder / f"rank{rank}.json"
    if not path.exists():
        return None
    return RankState(**(json.loads(read_text(path)) | MappedPosition.read(folder, rank)))


def read_states(folder: Path) -> list[RankState]:
    """Read the states of all ranks that have started, in rank order."""
    ranks = sorted(int(path.stem.removeprefix("rank")) for path in folder.glob("rank*.json"))
    return [state for rank in ranks if (state := read_state(folder, rank)) is not None]


def locate_frame(frame: FrameType | None) -> tuple[str, str]:
    """Return (innermost line of this project, function that waits for other ranks) of a stack; empty where none."""
    where, collective = "", ""
    # From the outermost call inwards: the first function of torch.distributed is the one that was called.
    for entry in traceback.extract_stack(frame) if frame is not None else ():
        if PACKAGE in entry.filename:
            path = f"{PACKAGE.strip(os.sep)}/{entry.filename.rpartition(PACKAGE)[2]}"
            where, collective = f"{path}:{entry.lineno} {entry.name}", ""
        elif entry.filename.endswith((_TORCH_COLLECTIVES, *_CORE_WAITS)) and not collective:
            collective = "" if entry.name == "wrapper" else entry.name
    return where, collective

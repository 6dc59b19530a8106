"""Where one rank is, as a file that others can read: `watch/rank<N>.json` in the run directory. Who writes it is heartbeat.py; who reads it, hang_diagnosis.py and the supervisor."""

from __future__ import annotations

import json
import mmap
import os
import struct
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from megatron_share4v.files import atomic_write_json

PACKAGE = f"{os.sep}megatron_share4v{os.sep}"
_OF_TORCH = f"torch{os.sep}distributed{os.sep}distributed_c10d.py"
# Where megatron-core waits for what torch.distributed began earlier.
_WAITS = ("p2p_communication.py", "param_and_grad_buffer.py")


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank says of itself. beat: counts up while it lives; born: start time of its process, in the kernel's ticks."""

    rank: int
    host: str
    pid: int
    born: int
    beat: int
    step: int
    phase: str
    micro_batch: int
    """-1: none yet."""
    since_s: float
    """In this phase and micro-batch."""
    where: str
    """Innermost line of this project on the main thread."""
    collective: str
    """The function that waits for other ranks; "": none does."""
    ended: str | None = None
    """None: it runs. "": it came to its end. Else the error that ended it."""
    code: int | None = None
    """What it ended with."""
    events: list[str] = field(default_factory=list)

    @property
    def position(self) -> str:
        """For messages."""
        micro_batch = f", micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"step {self.step}, {self.phase}{micro_batch}"


class Place:
    """Where a rank is right now, in a file mapped into its memory: setting it costs nothing, and the kernel keeps it when the process is killed."""

    _LAYOUT = struct.Struct("<qq32s")  # step, micro-batch, phase

    def __init__(self, folder: Path, rank: int) -> None:
        with open(folder / f"rank{rank}.place", "w+b") as file:
            file.write(bytes(self._LAYOUT.size))
            file.flush()
            self._memory = mmap.mmap(file.fileno(), self._LAYOUT.size)

    def set(self, *, step: int, phase: str, micro_batch: int) -> None:
        """Remember it."""
        self._LAYOUT.pack_into(self._memory, 0, step, micro_batch, phase.encode())

    @classmethod
    def read(cls, folder: Path, rank: int) -> dict[str, int | str]:
        """The fields of RankState that it replaces; none where the rank has no such file, or has not set it."""
        path = folder / f"rank{rank}.place"
        content = path.read_bytes() if path.exists() else b""
        if len(content) != cls._LAYOUT.size or not any(content):
            return {}
        step, micro_batch, phase = cls._LAYOUT.unpack(content)
        return {"step": step, "micro_batch": micro_batch, "phase": phase.rstrip(b"\0").decode()}


def write_state(folder: Path, state: RankState) -> None:
    """Replace the rank's file."""
    atomic_write_json(folder / f"rank{state.rank}.json", asdict(state))


def read_state(folder: Path, rank: int) -> RankState | None:
    """None: the rank has not said anything."""
    path = folder / f"rank{rank}.json"
    if not path.exists():
        return None
    return RankState(**(json.loads(path.read_text(encoding="utf-8")) | Place.read(folder, rank)))


def read_states(folder: Path) -> list[RankState]:
    """Of all ranks that have said something, in their order."""
    ranks = sorted(int(path.stem.removeprefix("rank")) for path in folder.glob("rank*.json"))
    return [state for rank in ranks if (state := read_state(folder, rank)) is not None]


def locate(frame: FrameType | None) -> tuple[str, str]:
    """(innermost line of this project, function that waits for other ranks) of a thread's stack; "" where there is none."""
    where, collective = "", ""
    # From the outermost call inwards; the first of torch's is the one that was asked for.
    for entry in traceback.extract_stack(frame) if frame is not None else ():
        if PACKAGE in entry.filename:
            where, collective = (
                f"{PACKAGE.strip(os.sep)}/{entry.filename.rpartition(PACKAGE)[2]}:{entry.lineno} {entry.name}",
                "",
            )
        elif entry.filename.endswith((_OF_TORCH, *_WAITS)) and not collective and entry.name != "wrapper":
            collective = entry.name
    return where, collective

"""tools/train.py in which one rank meets a fault at a chosen step, whatever the machine's speed. Several are separated by commas.

    torchrun ... tests/fault_injection.py KIND:RANK:STEP[:VALUE][,...] CONFIG.yaml [dotted.key=value ...]

`train` starts the same ranks without torchrun, from the fork server that has imported everything: the many runs of tests/resilience take a second
each instead of ten. The few that are about the launcher start the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import PRELOAD, meeting_point, world_environment

GRACE_S = 20.0
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Fault:
    """What happens on `rank` when step `step` (the first is 1; 0: the start) begins."""

    kind: str
    rank: int
    step: int
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, rank, step, *value = text.split(":")
        return cls(kind, int(rank), int(step), ":".join(value))


def by_signal(number: int) -> Callable[[Fault, Any], None]:
    return lambda fault, chunks: os.kill(os.getpid(), number)


def to_parent(number: int, program: str) -> Callable[[Fault, Any], None]:
    """A signal to the process that has started this one, which must be the one that is meant: a rank whose launcher has died has another parent."""

    def send(fault: Fault, chunks: Any) -> None:
        parent = os.getppid()
        command = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
        assert any(word.endswith(program) for word in command), f"the parent of this rank is {command}, not {program}"
        os.kill(parent, number)

    return send


def spoil(fault: Fault, chunks: Any) -> None:
    """One micro-batch of this step (number `value`) has no finite loss, nor gradient."""
    calls: list[int] = []

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        calls.append(1)
        if len(calls) == int(fault.value) + 1:
            handle.remove()
            return output * float("nan")
        return None

    handle = chunks[-1].register_forward_hook(hook)


def exaggerate(fault: Fault, chunks: Any) -> None:
    """The first micro-batch of this step comes out `value` times as large."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        handle.remove()
        return output * float(fault.value)

    handle = chunks[-1].register_forward_hook(hook)


def flip(fault: Fault, chunks: Any) -> None:
    """One bit of a frozen weight; trained ones are made anew from the optimizer's at each step."""
    import torch

    weight = next(
        parameter for name, parameter in chunks[0].named_parameters() if name.endswith("vision.class_embedding")
    )
    weight.data.view(torch.int32).view(-1)[3] ^= 1 << 20


def slow_down(fault: Fault, chunks: Any) -> None:
    """From now on every forward pass takes `value` seconds longer."""
    chunks[0].register_forward_pre_hook(lambda *_: time.sleep(float(fault.value)))


def kill_once(fault: Fault, chunks: Any) -> None:
    """The first time alone; the file `value` remembers it."""
    mark = Path(fault.value)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def stop_loader(fault: Fault, chunks: Any) -> None:
    """The loader processes of this rank hang."""
    children = multiprocessing.active_children()
    assert children, "no loader processes: set data.num_workers"
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)


def wait_for(fault: Fault, chunks: Any) -> None:
    """Go on when the file `value` is there."""
    deadline = time.monotonic() + TIMEOUT_S
    while not Path(fault.value).exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def err(fault: Fault, chunks: Any) -> None:
    """A mistake of this project, on one rank alone."""
    raise ValueError(f"planted on rank {fault.rank}")


def limit_files(fault: Fault, chunks: Any) -> None:
    """From now on no file of this process may be larger than `value` bytes: writing fails as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.value), resource.RLIM_INFINITY))


def enter(fault: Fault, chunks: Any) -> None:
    """See the disks that process `value` sees. Before anything has begun a thread, as the kernel wants it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        with open(f"/proc/{fault.value}/ns/{kind}") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")


def fill(fault: Fault, chunks: Any) -> None:
    """Someone else fills the disk of the file `value` to its last byte."""
    with contextlib.suppress(OSError), open(fault.value, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def die_in_save(fault: Fault, chunks: Any) -> None:
    """When all tensors of the checkpoint of step `value` are written but nothing is published."""
    from megatron_share4v.checkpoint import store

    hash_files = store.hash_files

    def dying(directory: Path, **options: Any) -> Any:
        if f"{int(fault.value):08d}" in directory.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return hash_files(directory, **options)

    store.hash_files = dying


def edit_code(fault: Fault, chunks: Any) -> None:
    """This rank's package is not the others'; at step 0, before anything is built."""
    from megatron_share4v.resilience.preflight import consistency

    consistency.code_hash = lambda package: "0123456789ab"


def lose_one_file(fault: Fault, chunks: Any) -> None:
    """The disk is full for what a thread of torch's own writes, and has room for all else."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    create_stream, begun = FileSystem.create_stream, threading.Event()

    @contextlib.contextmanager
    def full(self: FileSystem, path: Any, mode: str) -> Any:
        if threading.current_thread() is threading.main_thread():
            begun.wait(20.0)  # else it might write all files itself
        else:
            begun.set()
        with create_stream(self, path, mode) as stream:
            yield stream
            if threading.current_thread() is not threading.main_thread():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    FileSystem.create_stream = full


def write_slowly(fault: Fault, chunks: Any) -> None:
    """From now on every save takes `value` seconds longer."""
    from megatron_share4v.checkpoint import store

    hash_files = store.hash_files

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(float(fault.value))
        return hash_files(*args, **options)

    store.hash_files = slow


KINDS: dict[str, Callable[[Fault, Any], None]] = {
    "kill": by_signal(signal.SIGKILL),
    "kill_once": kill_once,
    "stop": by_signal(signal.SIGSTOP),
    "term": by_signal(signal.SIGTERM),
    "usr1": by_signal(signal.SIGUSR1),
    "sleep": lambda fault, chunks: time.sleep(float(fault.value)),
    "wait_for": wait_for,
    "raise": err,
    "term_parent": to_parent(signal.SIGTERM, "tools/supervise.py"),
    "kill_launcher": to_parent(signal.SIGKILL, "torch.distributed.run"),
    "nan": spoil,
    "stop_loader": stop_loader,
    "flip": flip,
    "slow": slow_down,
    "spike": exaggerate,
    "full": limit_files,
    "enter": enter,
    "fill": fill,
    "lost_file": lose_one_file,
    "slow_save": write_slowly,
    "kill_in_save": die_in_save,
    "other_code": edit_code,
}


def meet(faults: str, arguments: list[str]) -> None:
    """Be tools/train.py with these arguments, and meet the faults of this rank. Does not return when the run ends with an error."""
    from megatron_share4v.train import loop

    rank, train_step = int(os.environ.get("RANK", 0)), loop.train_step
    mine = [fault for fault in map(Fault.parse, filter(None, faults.split(","))) if fault.rank == rank]

    for fault in mine:
        if fault.step == 0:
            KINDS[fault.kind](fault, None)

    def meeting(chunks: Any, optimizer: Any, data: Any, **options: Any) -> Any:
        for fault in mine:
            if fault.step == data.step:
                KINDS[fault.kind](fault, chunks)
        return train_step(chunks, optimizer, data, **options)

    loop.train_step = meeting
    sys.argv = ["tools/train.py", *arguments]
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / "train.py"), run_name="__main__")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. codes: by rank, negative for a signal; output: what all ranks said."""

    codes: list[int]
    output: str


class Job:
    """The ranks of a run that has begun. `store` is where they meet; it lives as long as this."""

    def __init__(
        self, config: Path, ranks: int, *overrides: str, faults: str = "", only: dict[int, tuple[str, ...]] = {}
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        descriptor, self._said = tempfile.mkstemp(suffix=".said", dir=config.parent)
        os.close(descriptor)
        self._store, self.processes = meeting_point(), []
        for rank in range(ranks):
            arguments = [str(config), *overrides, *only.get(rank, ())]
            environment = world_environment(rank, ranks, self._store.port)
            self.processes.append(context.Process(target=_rank, args=(environment, self._said, faults, arguments)))
            self.processes[-1].start()

    def ended(self) -> Outcome:
        """Wait for it. When one rank has failed, the others are ended as torchrun does: SIGTERM, later SIGKILL."""
        deadline, ending = time.monotonic() + TIMEOUT_S, False
        while living := [process for process in self.processes if process.exitcode is None]:
            if not ending and any(process.exitcode for process in self.processes):
                deadline, ending = time.monotonic() + GRACE_S, True
                for process in living:
                    process.terminate()
            if time.monotonic() > deadline:
                for process in living:
                    process.kill()
            time.sleep(0.05)
        return Outcome([int(process.exitcode) for process in self.processes], Path(self._said).read_text())


def train(
    config: Path, ranks: int, *overrides: str, faults: str = "", only: dict[int, tuple[str, ...]] = {}
) -> Outcome:
    """Run to its end. only: overrides of single ranks."""
    return Job(config, ranks, *overrides, faults=faults, only=only).ended()


def _rank(environment: dict[str, str], said: str, faults: str, arguments: list[str]) -> None:
    import torch

    os.environ.update(environment)
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    meet(faults, arguments)


if __name__ == "__main__":
    meet(sys.argv[1], sys.argv[2:])

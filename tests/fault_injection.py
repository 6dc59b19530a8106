"""Run tools/train.py with faults injected on chosen ranks at chosen steps, independent of the machine's speed.

    torchrun ... tests/fault_injection.py KIND:RANK:STEP[:VALUE][,...] CONFIG.yaml [dotted.key=value ...]

`train` starts the same ranks without torchrun, from a fork server with all imports done, in a second instead of ten.
Tests of the launcher itself use torchrun.
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

from harness import PRELOAD, create_store, world_environment

GRACE_S = 20.0
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Fault:
    """A fault on `rank` at the beginning of 1-based `step`; step 0 is before the run is built."""

    kind: str
    rank: int
    step: int
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, rank, step, *value = text.split(":")
        return cls(kind, int(rank), int(step), ":".join(value))


def signal_self(number: int) -> Callable[[Fault, Any], None]:
    return lambda fault, chunks: os.kill(os.getpid(), number)


def signal_parent(number: int, program: str) -> Callable[[Fault, Any], None]:
    """Return a fault that signals the parent process, after checking that it runs `program`.

    A rank whose launcher has died has another parent.
    """

    def send(fault: Fault, chunks: Any) -> None:
        parent = os.getppid()
        command = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
        assert any(word.endswith(program) for word in command), f"the parent of this rank is {command}, not {program}"
        os.kill(parent, number)

    return send


def make_loss_nan(fault: Fault, chunks: Any) -> None:
    """Make loss and gradient of micro-batch number `value` of this step NaN."""
    calls: list[int] = []

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        calls.append(1)
        if len(calls) == int(fault.value) + 1:
            handle.remove()
            return output * float("nan")
        return None

    handle = chunks[-1].register_forward_hook(hook)


def scale_output(fault: Fault, chunks: Any) -> None:
    """Multiply the output of the first micro-batch of this step by `value`."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        handle.remove()
        return output * float(fault.value)

    handle = chunks[-1].register_forward_hook(hook)


def flip_weight_bit(fault: Fault, chunks: Any) -> None:
    """Flip one bit of a frozen weight; trained weights are overwritten from the optimizer's copy at each step."""
    import torch

    weight = next(
        parameter for name, parameter in chunks[0].named_parameters() if name.endswith("vision.class_embedding")
    )
    weight.data.view(torch.int32).view(-1)[3] ^= 1 << 20


def delay_forward(fault: Fault, chunks: Any) -> None:
    """Delay every forward pass from this step on by `value` seconds."""
    chunks[0].register_forward_pre_hook(lambda *_: time.sleep(float(fault.value)))


def kill_once(fault: Fault, chunks: Any) -> None:
    """Kill this rank the first time only; the file `value` marks that it has happened."""
    mark = Path(fault.value)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def stop_loaders(fault: Fault, chunks: Any) -> None:
    """Stop the loader processes of this rank with SIGSTOP."""
    children = multiprocessing.active_children()
    assert children, "no loader processes: set data.num_workers"
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)


def wait_for_file(fault: Fault, chunks: Any) -> None:
    """Wait until the file `value` exists."""
    deadline = time.monotonic() + TIMEOUT_S
    while not Path(fault.value).exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def raise_value_error(fault: Fault, chunks: Any) -> None:
    """Raise an unexpected exception on this rank."""
    raise ValueError(f"planted on rank {fault.rank}")


def limit_file_size(fault: Fault, chunks: Any) -> None:
    """Limit the file size of this process to `value` bytes, so that writes fail as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.value), resource.RLIM_INFINITY))


def enter_namespaces(fault: Fault, chunks: Any) -> None:
    """Enter the user and mount namespaces of process `value`; the kernel requires a process without threads."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        with open(f"/proc/{fault.value}/ns/{kind}") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")


def fill_disk(fault: Fault, chunks: Any) -> None:
    """Fill the disk to its last byte by writing to the file `value`."""
    with contextlib.suppress(OSError), open(fault.value, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def die_in_save(fault: Fault, chunks: Any) -> None:
    """Kill this rank in the save of step `value`, when all tensors are written but nothing is published."""
    from megatron_share4v.checkpoint import store

    hash_files = store.hash_files

    def hash_files_or_die(directory: Path, **options: Any) -> Any:
        if f"{int(fault.value):08d}" in directory.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return hash_files(directory, **options)

    store.hash_files = hash_files_or_die


def change_code_hash(fault: Fault, chunks: Any) -> None:
    """Give this rank another code hash than the other ranks; use at step 0."""
    from megatron_share4v.resilience.preflight import consistency

    consistency.code_hash = lambda package: "0123456789ab"


def fail_writer_threads(fault: Fault, chunks: Any) -> None:
    """Report a full disk to torch's writer threads only; the main thread can still write."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    create_stream, begun = FileSystem.create_stream, threading.Event()

    @contextlib.contextmanager
    def create_full_stream(self: FileSystem, path: Any, mode: str) -> Any:
        if threading.current_thread() is threading.main_thread():
            begun.wait(20.0)  # otherwise the main thread might write all files
        else:
            begun.set()
        with create_stream(self, path, mode) as stream:
            yield stream
            if threading.current_thread() is not threading.main_thread():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    FileSystem.create_stream = create_full_stream


def delay_saves(fault: Fault, chunks: Any) -> None:
    """Delay every save from this step on by `value` seconds."""
    from megatron_share4v.checkpoint import store

    hash_files = store.hash_files

    def hash_files_slowly(*args: Any, **options: Any) -> Any:
        time.sleep(float(fault.value))
        return hash_files(*args, **options)

    store.hash_files = hash_files_slowly


KINDS: dict[str, Callable[[Fault, Any], None]] = {
    "kill": signal_self(signal.SIGKILL),
    "kill_once": kill_once,
    "stop": signal_self(signal.SIGSTOP),
    "term": signal_self(signal.SIGTERM),
    "usr1": signal_self(signal.SIGUSR1),
    "sleep": lambda fault, chunks: time.sleep(float(fault.value)),
    "wait_for": wait_for_file,
    "raise": raise_value_error,
    "term_parent": signal_parent(signal.SIGTERM, "tools/supervise.py"),
    "kill_launcher": signal_parent(signal.SIGKILL, "torch.distributed.run"),
    "nan": make_loss_nan,
    "stop_loader": stop_loaders,
    "flip": flip_weight_bit,
    "slow": delay_forward,
    "spike": scale_output,
    "full": limit_file_size,
    "enter": enter_namespaces,
    "fill": fill_disk,
    "lost_file": fail_writer_threads,
    "slow_save": delay_saves,
    "kill_in_save": die_in_save,
    "other_code": change_code_hash,
}


def run_with_faults(faults: str, arguments: list[str]) -> None:
    """Run tools/train.py with these arguments and the faults of this rank. Raises SystemExit when the run fails."""
    from megatron_share4v.train import loop

    rank, train_step = int(os.environ.get("RANK", 0)), loop.train_step
    mine = [fault for fault in map(Fault.parse, filter(None, faults.split(","))) if fault.rank == rank]

    for fault in mine:
        if fault.step == 0:
            KINDS[fault.kind](fault, None)

    def train_step_with_faults(chunks: Any, optimizer: Any, data: Any, **options: Any) -> Any:
        for fault in mine:
            if fault.step == data.step:
                KINDS[fault.kind](fault, chunks)
        return train_step(chunks, optimizer, data, **options)

    loop.train_step = train_step_with_faults
    sys.argv = ["tools/train.py", *arguments]
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / "train.py"), run_name="__main__")


@dataclass(frozen=True)
class Outcome:
    """Exit codes by rank (negative: a signal) and the combined output of all ranks."""

    codes: list[int]
    output: str


class Job:
    """Processes of a started run, and the rendezvous store, which must outlive them."""

    def __init__(
        self, config: Path, ranks: int, *overrides: str, faults: str = "", only: dict[int, tuple[str, ...]] = {}
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        descriptor, self._output = tempfile.mkstemp(suffix=".output", dir=config.parent)
        os.close(descriptor)
        self._store, self.processes = create_store(), []
        for rank in range(ranks):
            arguments = [str(config), *overrides, *only.get(rank, ())]
            environment = world_environment(rank, ranks, self._store.port)
            self.processes.append(
                context.Process(target=_run_rank, args=(environment, self._output, faults, arguments))
            )
            self.processes[-1].start()

    def wait(self) -> Outcome:
        """Wait for all ranks. After one has failed, end the others as torchrun does: SIGTERM, later SIGKILL."""
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
        return Outcome([int(process.exitcode) for process in self.processes], Path(self._output).read_text())


def train(
    config: Path, ranks: int, *overrides: str, faults: str = "", only: dict[int, tuple[str, ...]] = {}
) -> Outcome:
    """Train with `ranks` processes until they end. only: additional overrides of single ranks."""
    return Job(config, ranks, *overrides, faults=faults, only=only).wait()


def _run_rank(environment: dict[str, str], output_path: str, faults: str, arguments: list[str]) -> None:
    import torch

    os.environ.update(environment)
    output = os.open(output_path, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    run_with_faults(faults, arguments)


if __name__ == "__main__":
    run_with_faults(sys.argv[1], sys.argv[2:])

"""Process groups for tests: `run_world(size, function, *args)` runs `function(*args)` on every rank.

Results are returned in rank order; the backend is gloo. Imports are done once, in the fork server. One start of a
process group should carry many checks.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 480
# torch._dynamo is imported by the first call of any optimizer.
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "megatron_share4v.mcore",
    "megatron_share4v.train.loop",
    "megatron_share4v.checkpoint.hf.importer",
    "megatron_share4v.checkpoint.hf.exporter",
    "megatron_share4v.caption.run",
    "megatron_share4v.evaluate.runner",
]


def create_store() -> Any:
    """Return a rendezvous store that already listens.

    A free port that was only looked up could be taken by a parallel test run before rank 0 listens.
    """
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def world_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment of a rank as torchrun sets it when torchrun hosts the store."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _main(function: Callable, rank: int, size: int, port: int, args: tuple, pipe: Any) -> None:
    os.environ.update(world_environment(rank, size, port))
    import torch

    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.launch import World, process_group

    torch.set_num_threads(1)
    with process_group(World.from_environment(), Device("cpu"), timeout_s=TIMEOUT_S):
        try:
            # Pickle by value: multiprocessing would share tensor memory, which ends with this process.
            report = pickle.dumps((True, function(*args)))
        except BaseException:
            # Send before leaving the process group, which makes the other ranks fail: the first report is the cause.
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            raise SystemExit(1) from None
        pipe.send_bytes(report)


def forkserver() -> Any:
    """Return the multiprocessing context of the fork server with PRELOAD imported; one server per session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start_forkserver() -> None:
    """Start the fork server now.

    A process has one fork server; if a data loader starts it first, it lacks PRELOAD for all later tests.
    """
    forkserver()
    multiprocessing.forkserver.ensure_running()


def run_world(size: int, function: Callable, *args: Any) -> list[Any]:
    """Run `function(*args)` on `size` ranks; return the results in rank order. Raises the first failure."""
    context = forkserver()
    store = create_store()
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(function, rank, size, store.port, args, sender), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        while len(results) < size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=TIMEOUT_S)
            if not ready:
                raise AssertionError(
                    f"ranks {[rank for rank in range(size) if rank not in results]} sent nothing within {TIMEOUT_S} s"
                )
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise AssertionError(
                        f"rank {rank} died without a report (exit code {processes[rank].exitcode})"
                    ) from None
                if not succeeded:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
    finally:
        for process in processes:
            if len(results) < size:
                process.kill()
            process.join()
    return [results[rank] for rank in range(size)]

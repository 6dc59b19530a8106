"""Preflight checks that need all ranks (shared folders, clocks, speed, bandwidth), and the merged report.

Each rank also checks its own machine (node.py). What makes a run impossible becomes one ConfigError on every rank;
everything else is a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_share4v
from megatron_share4v.checkpoint.manifest import library_versions
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.collectives import broadcast_object, gather_objects
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.planner.gpus import known_gpu
from megatron_share4v.resilience.preflight.consistency import code_hash, describe_start, find_differences
from megatron_share4v.resilience.preflight.node import Finding, check_machine, describe_machine, error, nearest_existing

SHOWN = 5
MEGABYTE = 1_000_000
SLOW_FRACTION, LINK_FRACTION = 0.8, 0.3
"""Warn below these fractions of the median rank's matrix product speed, and of the data sheet's link bandwidth."""
MAX_CLOCK_SKEW_S = 2.0
FILE_WAIT_S = 20.0
"""How long a network file system may take to show a new file."""


@dataclass
class Report:
    """Result of the checks: lines of information, and errors and warnings with the ranks that have them."""

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*self.lines, *(f"warning: {text}" for text in self.warnings)])


def check_nodes(config: RunConfig | None, *, shared: Sequence[Path], timeout_s: int) -> Report | None:
    """Open a process group, run all checks and close it; return the report on rank 0, None on other ranks.

    `shared`: folders that all ranks must share, besides run.directory. Raises ConfigError on all ranks when a run is
    impossible; when the process group cannot be opened, on the ranks that waited for it.
    """
    world = World.from_environment()
    if config is not None:
        Layout.for_world(config.parallel, world_size=world.size)
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(process_group(world, device, timeout_s=timeout_s))
            dist.barrier()
        except (RuntimeError, ValueError) as problem:  # the only common bases of gloo's, NCCL's and the store's errors
            raise ConfigError(_connection_failure(world, timeout_s, problem)) from problem
        report = check_all(config, rank=world.rank, device=device, shared=shared)
    if report.errors:
        raise ConfigError("these machines cannot run the job:" + "".join(f"\n  {text}" for text in report.errors))
    return report if world.rank == 0 else None


def check_all(config: RunConfig | None, *, rank: int, device: Device, shared: Sequence[Path]) -> Report:
    """Run all checks within a process group; the report is equal on all ranks. Collective."""
    report, hosts = Report(), gather_objects(socket.gethostname())
    report.lines.append(_describe_machines(hosts, device))
    errors, warnings = _find_differences(config, device, hosts)
    report.errors += errors
    report.warnings += warnings
    findings = [*check_machine(config, device=device), *_check_inputs(config)]
    if not report.errors:  # ranks with other code may not call the same collectives
        directories = [*shared, *([Path(config.run.directory)] if config else [])]
        for directory in directories:
            findings += check_shared(directory, rank=rank, ranks=len(hosts))
        report.lines += [f"shared folder: {directory}, written and read by every rank" for directory in directories]
        for lines, found in (_check_clocks(hosts), _check_speed(hosts, device), _check_bandwidth(hosts, device)):
            report.lines += lines
            report.warnings += found
    findings_by_rank = gather_objects(findings)
    for level, texts in (("error", report.errors), ("warning", report.warnings)):
        by_text: dict[str, list[int]] = {}
        for rank, own in enumerate(findings_by_rank):
            for finding in own:
                if finding.level == level:
                    by_text.setdefault(finding.text, []).append(rank)
        texts += [f"{_who(ranks, hosts)}: {text}" for text, ranks in by_text.items()]
    return report


def _connection_failure(world: World, timeout_s: int, problem: Exception) -> str:
    where = f"{os.environ.get('MASTER_ADDR', 'itself')}:{os.environ.get('MASTER_PORT', '')}"
    first = str(problem).strip().splitlines() or [type(problem).__name__]
    return (
        f"rank {world.rank} of {world.size} on {socket.gethostname()} could not connect to the others at {where} "
        f"within {timeout_s} s: {first[0][:300]}. Check that every node was started, with the same number of ranks; "
        "that this address is reachable from all of them; and which network card is used "
        "(NCCL_SOCKET_IFNAME, on CPUs GLOO_SOCKET_IFNAME)"
    )


def _describe_machines(hosts: Sequence[str], device: Device) -> str:
    nodes = dict.fromkeys(hosts)
    each = ", ".join(
        f"{node} (ranks {_format_ranks([rank for rank, host in enumerate(hosts) if host == node])})"
        for node in list(nodes)[:SHOWN]
    )
    more = f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else ""
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return f"{len(hosts)} ranks on {len(nodes)} nodes: {each}{more}; {device.describe()}; {versions}"


def _find_differences(config: RunConfig | None, device: Device, hosts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (errors, warnings): differences between ranks in what must be equal, and in what should be."""
    if config is not None:
        described = describe_start(config)
    else:
        described = {
            "code": code_hash(Path(megatron_share4v.__file__).parent),
            "python": platform.python_version(),
            **library_versions(),
        }
    required, expected = gather_objects(described), gather_objects(describe_machine(device))
    return find_differences(list(zip(hosts, required))), find_differences(list(zip(hosts, expected)))


def _check_inputs(config: RunConfig | None) -> Iterator[Finding]:
    """Check that data sets, tokenizer and initial weights exist on every rank and are equal."""
    if config is None:
        return
    data = config.data
    sources = [data.train] if isinstance(data.train, str) else [source.path for source in data.train]
    files = {
        "data.train": [Path(source) / "dataset.json" for source in sources],
        "data.tokenizer": [Path(data.tokenizer)],
    }
    if config.checkpoint.initialize_from:
        files["checkpoint.initialize_from"] = [Path(config.checkpoint.initialize_from)]
    for key, paths in files.items():
        for path in paths:
            digests = gather_objects(_digest(path))
            usual = statistics.mode([digest for digest in digests if digest is not None] or [None])
            if digests[dist.get_rank()] is None:
                yield error(f"{key}: there is no {path} here")
            elif digests[dist.get_rank()] != usual:
                yield error(f"{key}: {path} is another file here than on most ranks")


def check_shared(directory: Path, *, rank: int, ranks: int) -> list[Finding]:
    """Check that all ranks can write into a folder and see each other's files; it is left as it was. Collective."""
    token = broadcast_object(uuid.uuid4().hex[:8])
    trial, refusal = directory / f".doctor_{token}", ""
    created = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    try:
        trial.mkdir(parents=True, exist_ok=True)
        (trial / str(rank)).write_text(token)
    except OSError as problem:
        refusal = problem.strerror or str(problem)
    refused = gather_objects(refusal)
    found = [error(f"cannot write into {nearest_existing(directory)}: {refusal}")] if refusal else []
    wanted = [0] if rank else [number for number in range(ranks) if not refused[number]]
    unseen = [] if refusal or refused[0] else _wait_for([trial / str(number) for number in wanted])
    if unseen and rank:
        found.append(
            error(f"does not see in {directory} what rank 0 wrote there: it is not one folder shared by all nodes")
        )
    elif unseen:
        found.append(
            error(
                f"does not see in {directory} what ranks {_format_ranks([int(path.name) for path in unseen])} wrote "
                "there: it is not one folder shared by all nodes"
            )
        )
    dist.barrier()
    shutil.rmtree(trial, ignore_errors=True)
    dist.barrier()
    for parent in created:
        if parent.exists() and not any(parent.iterdir()):
            shutil.rmtree(parent, ignore_errors=True)
    return found


def _wait_for(paths: Sequence[Path]) -> list[Path]:
    """Wait for files to appear; return those that do not within FILE_WAIT_S."""
    deadline = time.monotonic() + FILE_WAIT_S
    while (missing := [path for path in paths if not path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return missing


def _check_clocks(hosts: Sequence[str]) -> tuple[list[str], list[str]]:
    dist.barrier()
    times = gather_objects(time.time())
    usual = statistics.median(times)
    wrong = [rank for rank, at in enumerate(times) if abs(at - usual) > MAX_CLOCK_SKEW_S]
    if not wrong:
        return [], []
    skew = f"the clock is {MAX_CLOCK_SKEW_S:g} s or more away from the others'; logs of nodes cannot be compared"
    return [], [f"{_who(wrong, hosts)}: {skew}"]


def _check_speed(hosts: Sequence[str], device: Device) -> tuple[list[str], list[str]]:
    """Time matrix products on all ranks at once; a slow rank delays every step of all."""
    size, dtype = (8192, torch.bfloat16) if device.kind == "cuda" else (256, torch.float32)
    factor = torch.randn(size, size, device=device.torch_device, dtype=dtype)

    def multiply() -> None:
        torch.mm(factor, factor)

    dist.barrier()
    speeds = gather_objects(2 * size**3 / _time_per_call(multiply, device, repeat=20) / 1e12)
    usual = statistics.median(speeds)
    slow = [rank for rank, speed in enumerate(speeds) if speed < SLOW_FRACTION * usual]
    line = f"matrix products ({size} x {size}, {dtype}): {usual:.3g} TFLOP/s per rank, the slowest {min(speeds):.3g}"
    if not slow:
        return [line], []
    measured = f"{min(speeds):.3g} TFLOP/s and less than {SLOW_FRACTION:.0%} of the others' {usual:.3g}"
    return [line], [f"{_who(slow, hosts)}: matrix products at {measured}"]


def _check_bandwidth(hosts: Sequence[str], device: Device) -> tuple[list[str], list[str]]:
    """Time an all-reduce over all ranks, the collective of data-parallel training."""
    ranks, size = len(hosts), (512 if device.kind == "cuda" else 4) * MEGABYTE
    if ranks == 1:
        return [], []
    buffer = torch.ones(size // 4, device=device.torch_device)

    def reduce() -> None:
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX)

    seconds = max(gather_objects(_time_per_call(reduce, device, repeat=5)))
    rate = 2 * (ranks - 1) / ranks * size / seconds
    timing = f"{1000 * seconds:.1f} ms, {rate / 1e9:.3g} GB/s per rank"
    line = f"all-reduce of {size // MEGABYTE} MB over {ranks} ranks: {timing}"
    gpu = known_gpu(torch.cuda.get_device_name()) if device.kind == "cuda" else None
    if gpu is None:
        return [line], []
    nominal = gpu.link if len(set(hosts)) == 1 else gpu.network
    if rate >= LINK_FRACTION * nominal:
        return [line], []
    return [line], [
        f"the all-reduce moves {rate / 1e9:.3g} GB/s per rank, less than {LINK_FRACTION:.0%} of a link's "
        f"{nominal / 1e9:.3g}: see NCCL_DEBUG=INFO for the path taken"
    ]


def _time_per_call(function: Callable[[], None], device: Device, *, repeat: int) -> float:
    for _ in range(2):
        function()
    device.synchronize()
    started = time.perf_counter()
    for _ in range(repeat):
        function()
    device.synchronize()
    return (time.perf_counter() - started) / repeat


def _digest(path: Path) -> str | None:
    """Hash the content of a file, or list the names in a folder; None when the path does not exist."""
    if path.is_dir():
        return ",".join(sorted(entry.name for entry in path.iterdir()))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    if len(ranks) == len(hosts):
        return "every rank" if len(hosts) > 1 else "this rank"
    if len(nodes := {hosts[rank] for rank in ranks}) == 1:
        return f"rank {_format_ranks(ranks)} ({nodes.pop()})"
    return (
        "rank "
        + ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:SHOWN])
        + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
    )


def _format_ranks(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers[:SHOWN])) + (f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else "")

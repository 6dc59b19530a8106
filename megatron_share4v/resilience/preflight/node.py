"""Preflight checks of one rank on its own machine: GPU, kernels, memory, disk, limits, environment. No collectives."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch

from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import OpsError
from megatron_share4v.mcore.transformer_engine import te_unavailable_reason
from megatron_share4v.ops.backend import choose_ops_backend
from megatron_share4v.parallel.device import Device
from megatron_share4v.planner.memory import Chunk, weight_shapes

GIB = 2**30
MIN_OPEN_FILES, MIN_SHARED_MEMORY = 4096, GIB
CLOCK_FRACTION = 0.8
"""Warn when the clock limit of a GPU is below this fraction of its maximum."""
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}

BAD_SETTINGS = {
    "LD_BIND_NOW": "Transformer Engine cannot be imported with it",
    "CUDA_LAUNCH_BLOCKING": "every kernel launch waits for its end",
    "NCCL_P2P_DISABLE": "the GPUs of a node do not use NVLink",
    "NCCL_IB_DISABLE": "nodes do not use InfiniBand",
    "NCCL_SHM_DISABLE": "the ranks of a node do not use shared memory",
    "NVIDIA_TF32_OVERRIDE": "fp32 products ignore torch's TF32 setting",
}
"""Environment variables of debugging sessions that slow a run down when left set, with their effect."""

GPU_FIELDS = (
    "driver_version", "clocks.max.sm", "clocks.applications.graphics", "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.sw_thermal_slowdown", "ecc.errors.uncorrected.volatile.total", "memory.used",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Finding about one rank: an error makes a run impossible, a warning makes it slow or fail later."""

    level: Literal["error", "warning"]
    text: str


def error(text: str) -> Finding:
    """Return a finding that makes a run impossible."""
    return Finding("error", text)


def warning(text: str) -> Finding:
    """Return a finding that makes a run slow or fail later."""
    return Finding("warning", text)


def describe_machine(device: Device) -> dict[str, str]:
    """Return properties that should be equal on all ranks: device, driver and library versions."""
    found = {"device": device.describe(), "transformer engine": _version("transformer-engine")}
    if device.kind == "cuda":
        found |= {
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
        found |= {"driver": gpu_status(device).get("driver_version", "unknown")}
    return found


def check_machine(
    config: RunConfig | None, *, device: Device, environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Run all checks of this rank's machine."""
    found = [
        *check_device(device, local_size=int(environment.get("LOCAL_WORLD_SIZE", "1"))),
        *check_settings(environment),
        *check_limits(device),
    ]
    if device.kind == "cuda":
        found += check_gpu_status(gpu_status(device))
    if config is not None:
        found += [*check_kernels(config, device), *check_capacity(config)]
    return found


def check_device(device: Device, *, local_size: int) -> Iterator[Finding]:
    """Check that GPUs can be used and their memory is free."""
    if device.kind == "cuda":
        free, total = torch.cuda.mem_get_info(device.index)
        if free < 0.9 * total:
            yield warning(
                f"only {free / GIB:.1f} of {total / GIB:.1f} GiB of the GPU's memory are free: "
                "another process holds the rest (nvidia-smi shows it)"
            )
        return
    nodes = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not nodes:
        return
    if torch.version.cuda is None:
        yield error(
            f"{nodes} GPUs, and this torch ({torch.__version__}) is built without CUDA; install the package with [gpu]"
        )
    elif not torch.cuda.is_available():
        yield error(
            f"{nodes} GPUs, and torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them; "
            "the driver is older than that, or not loaded"
        )
    else:
        yield error(
            f"{torch.cuda.device_count()} visible GPUs for {local_size} ranks of this node; start as many ranks as GPUs"
        )


def gpu_status(device: Device) -> dict[str, str]:
    """Query GPU_FIELDS of this rank's GPU from nvidia-smi; empty when it is missing or does not respond in time."""
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(GPU_FIELDS)}",
        "--format=csv,noheader,nounits",
        f"--id={_uuid(device)}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    [values] = csv.reader([done.stdout.strip()], skipinitialspace=True)
    return dict(zip(GPU_FIELDS, values))


def check_gpu_status(status: Mapping[str, str]) -> Iterator[Finding]:
    """Check clocks, throttling and memory errors; fields that the GPU does not have are skipped."""
    if not status:
        yield warning("nvidia-smi does not respond: clocks, throttling and memory errors were not checked")
        return
    limit, most = (_number(status[name]) for name in ("clocks.applications.graphics", "clocks.max.sm"))
    if limit is not None and most and limit < CLOCK_FRACTION * most:
        yield warning(
            f"the GPU's clock is set to {limit:.0f} of {most:.0f} MHz "
            "(nvidia-smi --reset-applications-clocks undoes that)"
        )
    for name in ("clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.sw_thermal_slowdown"):
        if status[name] == "Active":
            yield warning(f"the GPU is slowed down by {name.rpartition('.')[2]}: too hot, or too little power")
    memory_errors = status["ecc.errors.uncorrected.volatile.total"]
    if _number(memory_errors):
        yield error(f"the GPU had {memory_errors} uncorrected memory errors since it was started; take the node out")


def check_settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check for environment variables that slow a run down."""
    for name, effect in BAD_SETTINGS.items():
        if environment.get(name, "0") not in ("", "0"):
            yield warning(f"{name}={environment[name]} is set: {effect}")


def check_limits(device: Device) -> Iterator[Finding]:
    """Check the limits of open files, locked memory and shared memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < MIN_OPEN_FILES:
        yield warning(
            f"only {files} files may be open (ulimit -n): large data sets and many ranks need {MIN_OPEN_FILES}"
        )
    if device.kind != "cuda":
        return
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and Path("/dev/infiniband").exists():
        yield warning(
            f"only {locked / GIB:.2f} GiB of memory may be locked (ulimit -l), which InfiniBand needs unlimited"
        )
    shared = Path("/dev/shm")
    if shared.exists() and shutil.disk_usage(shared).total < MIN_SHARED_MEMORY:
        yield warning("/dev/shm has less than 1 GiB, which NCCL needs (docker run --shm-size)")


def check_kernels(config: RunConfig, device: Device) -> Iterator[Finding]:
    """Check that the configured kernels are available; this builds the fused ops."""
    try:
        choice = choose_ops_backend(config.ops, device=device.kind)
    except OpsError as problem:
        yield error(str(problem))
    else:
        if choice.implementation == "reference" and config.ops == "auto":
            yield warning(f"fused ops: plain torch will be used ({choice.reason})")
    if config.attention == "te" and (missing := te_unavailable_reason()) is not None:
        yield error(f"attention: te was requested: {missing}")


def check_capacity(config: RunConfig) -> Iterator[Finding]:
    """Check the memory of this node and the disk space for checkpoints."""
    available = psutil.virtual_memory().available
    if available < 4 * GIB:
        yield warning(f"only {available / GIB:.1f} GiB of memory are available on this node")
    directory = nearest_existing(Path(config.run.directory))
    free, one = shutil.disk_usage(directory).free, checkpoint_bytes(config)
    keep = config.checkpoint.keep_last + 1
    if free < one:
        yield error(
            f"{directory} has {free / GIB:.1f} GiB free and one checkpoint takes about {one / GIB:.1f} GiB; "
            "free disk space, or set run.directory"
        )
    elif free < keep * one:
        yield warning(
            f"{directory} has {free / GIB:.1f} GiB free and {keep} checkpoints (checkpoint.keep_last and the one being "
            f"written) take {keep * one / GIB:.1f}"
        )


def checkpoint_bytes(config: RunConfig) -> int:
    """Estimate the size of a checkpoint: weights, and for trained ones two moments and (bf16 only) an fp32 copy."""
    whole = Chunk(layers=config.model.language.num_layers, first=True, last=True)
    element = ELEMENT_BYTES[config.precision.dtype]
    state = 8 if config.precision.dtype == "fp32" else 12
    return sum(
        elements * count * (element + (state if trains else 0))
        for elements, count, trains in weight_shapes(config.model, whole, tensor=1)
    )


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _uuid(device: Device) -> str:
    uuid = str(torch.cuda.get_device_properties(device.index).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

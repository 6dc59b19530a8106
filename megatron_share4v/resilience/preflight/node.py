"""What one rank finds on its own machine before a run: GPU, kernels, memory, disk, limits, settings. Nothing here talks to other ranks (cluster.py)."""

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
from megatron_share4v.planner.memory import Chunk, tensors

GIB = 2**30
FEW_FILES, LITTLE_SHARED = 4096, GIB
CLOCK_SHARE = 0.8
"""A GPU whose highest clock is below this share of what it can do is named."""
ELEMENT = {"bf16": 2, "fp32": 4}

BAD_SETTINGS = {
    "LD_BIND_NOW": "Transformer Engine cannot be imported with it",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "the GPUs of a node do not talk over NVLink",
    "NCCL_IB_DISABLE": "nodes do not talk over InfiniBand",
    "NCCL_SHM_DISABLE": "the ranks of a node do not share memory",
    "NVIDIA_TF32_OVERRIDE": "fp32 products are computed otherwise than torch was told",
}
"""Environment variables that someone set for a test and forgot, and what they do."""

GPU_FIELDS = (
    "driver_version", "clocks.max.sm", "clocks.applications.graphics", "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.sw_thermal_slowdown", "ecc.errors.uncorrected.volatile.total", "memory.used",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something about a rank. error: a run is impossible; warning: it is slow, or will fail later."""

    level: Literal["error", "warning"]
    text: str


def error(text: str) -> Finding:
    return Finding("error", text)


def warning(text: str) -> Finding:
    return Finding("warning", text)


def facts(device: Device) -> dict[str, str]:
    """What should be equal on all ranks and is not decided by code and configuration."""
    found = {"device": device.describe(), "transformer engine": _version("transformer-engine")}
    if device.kind == "cuda":
        found |= {
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
        found |= {"driver": gpu_status(device).get("driver_version", "unknown")}
    return found


def examine_machine(
    config: RunConfig | None, *, device: Device, environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """All findings about this rank's own machine."""
    found = [
        *check_device(device, local_size=int(environment.get("LOCAL_WORLD_SIZE", "1"))),
        *check_settings(environment),
        *check_limits(device),
    ]
    if device.kind == "cuda":
        found += judge_gpu(gpu_status(device))
    if config is not None:
        found += [*check_kernels(config, device), *check_room(config)]
    return found


def check_device(device: Device, *, local_size: int) -> Iterator[Finding]:
    """A GPU that is there and cannot be used."""
    if device.kind == "cuda":
        free, total = torch.cuda.mem_get_info(device.index)
        if free < 0.9 * total:
            yield warning(
                f"only {free / GIB:.1f} of {total / GIB:.1f} GiB of the GPU's memory are free: another process holds the rest (nvidia-smi shows it)"
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
            f"{nodes} GPUs, and torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them; the driver is older than that, or not loaded"
        )
    else:
        yield error(
            f"{torch.cuda.device_count()} visible GPUs for {local_size} ranks of this node; start as many ranks as GPUs"
        )


def gpu_status(device: Device) -> dict[str, str]:
    """GPU_FIELDS of this rank's GPU, as nvidia-smi says them; empty where it is not installed or does not answer in time."""
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


def judge_gpu(status: Mapping[str, str]) -> Iterator[Finding]:
    """Slow or damaged by its own account. A field that the GPU does not have is passed over."""
    if not status:
        yield warning("nvidia-smi does not answer: clocks, throttling and memory errors were not looked at")
        return
    limit, most = (_number(status[name]) for name in ("clocks.applications.graphics", "clocks.max.sm"))
    if limit is not None and most and limit < CLOCK_SHARE * most:
        yield warning(
            f"the GPU's clock is set to {limit:.0f} of {most:.0f} MHz (nvidia-smi --reset-applications-clocks undoes that)"
        )
    for name in ("clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.sw_thermal_slowdown"):
        if status[name] == "Active":
            yield warning(f"the GPU is slowed down by {name.rpartition('.')[2]}: too hot, or too little power")
    if _number(status["ecc.errors.uncorrected.volatile.total"]):
        yield error(
            f"the GPU had {status['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors since it was started; take the node out"
        )


def check_settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Environment variables that slow a run down."""
    for name, effect in BAD_SETTINGS.items():
        if environment.get(name, "0") not in ("", "0"):
            yield warning(f"{name}={environment[name]} is set: {effect}")


def check_limits(device: Device) -> Iterator[Finding]:
    """Open files, locked and shared memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        yield warning(f"only {files} files may be open (ulimit -n): large data sets and many ranks need {FEW_FILES}")
    if device.kind != "cuda":
        return
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and Path("/dev/infiniband").exists():
        yield warning(
            f"only {locked / GIB:.2f} GiB of memory may be locked (ulimit -l), which InfiniBand needs unlimited"
        )
    shared = Path("/dev/shm")
    if shared.exists() and shutil.disk_usage(shared).total < LITTLE_SHARED:
        yield warning("/dev/shm has less than 1 GiB, which NCCL wants (docker run --shm-size)")


def check_kernels(config: RunConfig, device: Device) -> Iterator[Finding]:
    """Whether what the configuration asks for can be had; building the ops is part of the answer."""
    try:
        choice = choose_ops_backend(config.ops, device=device.kind)
    except OpsError as problem:
        yield error(str(problem))
    else:
        if choice.implementation == "reference" and config.ops == "auto":
            yield warning(f"fused ops: plain torch will be used ({choice.reason})")
    if config.attention == "te" and (missing := te_unavailable_reason()) is not None:
        yield error(f"attention: te was asked for: {missing}")


def check_room(config: RunConfig) -> Iterator[Finding]:
    """Memory of this node, and room for checkpoints where they are written."""
    available = psutil.virtual_memory().available
    if available < 4 * GIB:
        yield warning(f"only {available / GIB:.1f} GiB of memory are available on this node")
    directory = existing(Path(config.run.directory))
    free, one = shutil.disk_usage(directory).free, checkpoint_bytes(config)
    keep = config.checkpoint.keep_last + 1
    if free < one:
        yield error(
            f"{directory} has {free / GIB:.1f} GiB free and one checkpoint takes about {one / GIB:.1f} GiB; make room, or set run.directory"
        )
    elif free < keep * one:
        yield warning(
            f"{directory} has {free / GIB:.1f} GiB free and {keep} checkpoints (checkpoint.keep_last and the one being written) take {keep * one / GIB:.1f}"
        )


def checkpoint_bytes(config: RunConfig) -> int:
    """About what one takes: weights as they are computed with, and of what trains an fp32 copy (bf16 alone) and two moments."""
    whole = Chunk(layers=config.model.language.num_layers, first=True, last=True)
    element = ELEMENT[config.precision.dtype]
    state = 8 if config.precision.dtype == "fp32" else 12
    return sum(
        elements * count * (element + (state if trains else 0))
        for elements, count, trains in tensors(config.model, whole, tensor=1)
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
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

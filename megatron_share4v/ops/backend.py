"""Choice between native ops and their references, and loading of the chosen library."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_share4v.errors import OpsError
from megatron_share4v.files import read_text
from megatron_share4v.logging import get_logger
from megatron_share4v.ops.build import (
    LIBRARY,
    BuildFailed,
    Toolchain,
    build_key,
    csrc_directory,
    default_cache_directory,
    find_or_build,
    find_toolchain,
    source_hash,
)
from megatron_share4v.ops.op import Implementation
from megatron_share4v.ops.registry import OPS, register_all

if TYPE_CHECKING:  # ops can be tested and measured where only torch is installed
    from megatron_share4v.config.run import Ops

REMEDY = (
    "install g++ (and, for GPUs, CUDA's nvcc) and start again, or bring a library built by tools/build_ops.py, "
    "or set ops: reference"
)


@dataclass(frozen=True)
class OpsBackend:
    """The ops implementation of this process.

    Pass `implementation` to the ops' functions; record `line` with the run.
    """

    implementation: Implementation
    reason: str
    library: Path | None = None

    @property
    def line(self) -> str:
        """Return one line for the log and the run directory."""
        return f"fused ops: {self.implementation} ({self.reason})"


@dataclass(frozen=True)
class LibrarySources:
    """Where a library can come from; the defaults are this machine's."""

    toolchain: Toolchain | None = field(default_factory=find_toolchain)
    cache: Path = field(default_factory=default_cache_directory)
    csrc: Path = field(default_factory=csrc_directory)
    prebuilt: Path = Path(__file__).parent / "prebuilt"


def choose_ops_backend(requested: Ops, *, device: str, available: LibrarySources | None = None) -> OpsBackend:
    """Choose the implementation, load its library, and log the choice.

    `device`: "cpu" or "cuda", where the tensors will be.

    native: a prebuilt library, else one built from csrc/ by the available compilers; both must support `device`.
    reference: plain torch. auto: native where available, else reference, with the reason. Raises OpsError when `native`
    is unavailable.
    """
    choice = _decide(requested, device=device, available=available or LibrarySources())
    if choice.library is not None:
        load_library(choice.library)
    get_logger().info(choice.line)
    return choice


def _decide(requested: Ops, *, device: str, available: LibrarySources) -> OpsBackend:
    if requested == "reference":
        return OpsBackend("reference", "as configured")
    try:
        return _native(device, available)
    except OpsError as error:
        if requested == "native":
            raise OpsError(f"ops: native was requested on {device}, but is unavailable: {error}. {REMEDY}") from error
        return OpsBackend("reference", str(error))


def _native(device: str, available: LibrarySources) -> OpsBackend:
    toolchain, failures = available.toolchain, []
    metadata = _prebuilt_metadata(available)
    if metadata is not None and (device == "cpu" or metadata["cuda"]):
        return OpsBackend(
            "native", f"prebuilt, {'C++ and CUDA' if metadata['cuda'] else 'C++'}", available.prebuilt / LIBRARY
        )
    if toolchain is None:
        raise OpsError("no C++ compiler (g++, c++) on PATH and no prebuilt library that fits")
    if device != "cpu" and toolchain.nvcc is None:
        raise OpsError("no nvcc on PATH and no prebuilt library with CUDA kernels")
    if toolchain.nvcc is not None:
        try:
            return OpsBackend(
                "native", toolchain.description, find_or_build(toolchain, cache=available.cache, csrc=available.csrc)
            )
        except BuildFailed as error:
            if device != "cpu":
                raise
            failures.append(f"; without CUDA kernels, since {error}")
    cpu_only = Toolchain(toolchain.cxx)
    return OpsBackend(
        "native",
        cpu_only.description + "".join(failures),
        find_or_build(cpu_only, cache=available.cache, csrc=available.csrc),
    )


def _prebuilt_metadata(available: LibrarySources) -> dict | None:
    """Return the metadata of the prebuilt library; None when there is none or it was built from other sources."""
    path = available.prebuilt / "built.json"
    if not path.is_file() or not (available.prebuilt / LIBRARY).is_file():
        return None
    metadata = json.loads(read_text(path))
    return metadata if metadata["sources"] == source_hash(available.csrc) else None


@functools.cache
def load_library(library: Path) -> None:
    """Load the library into this process and register fake kernels and gradients of its ops.

    A process has one library. Raises OpsError.
    """
    loaded = {Path(path).resolve() for path in torch.ops.loaded_libraries if Path(path).name == LIBRARY}
    if loaded - {library.resolve()}:
        raise OpsError(f"this process has the ops of {loaded.pop()} and cannot load those of {library} too")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise OpsError(
            f"the ops in {library} cannot be loaded ({error}); remove that file to build them again, "
            "or set ops: reference"
        ) from error
    register_all()


def describe_library(available: LibrarySources | None = None) -> str:
    """Describe this machine's compilers, sources, prebuilt library, and cached library or failed build, in lines."""
    available = available or LibrarySources()
    toolchain = available.toolchain
    lines = [
        f"ops: {', '.join(OPS)}",
        f"sources: {available.csrc} ({source_hash(available.csrc)[:12]})",
    ]
    lines.append(f"prebuilt: {available.prebuilt if _prebuilt_metadata(available) else 'none that fits'}")
    if toolchain is None:
        return "\n".join([*lines, "compilers: none"])
    lines.append(f"compilers: {toolchain.cxx}, {toolchain.nvcc or 'no nvcc'}")
    folder = available.cache / build_key(toolchain, available.csrc)
    found = next(
        (
            state
            for name, state in ((LIBRARY, "built"), ("failed.log", "failed, see failed.log"))
            if (folder / name).is_file()
        ),
        "not built yet",
    )
    return "\n".join([*lines, f"cache: {folder} ({found})"])

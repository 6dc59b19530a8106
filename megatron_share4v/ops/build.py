"""Compilation of csrc/ into one library, at first use into a cache or beforehand into a directory.

Only torch's stable C ABI is used, so the library works with every torch from 2.11 on and every Python. backend.py
decides whether it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_share4v.errors import OpsError
from megatron_share4v.files import read_text, wait_for_lock
from megatron_share4v.logging import get_logger

LIBRARY = "share4v_ops.so"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
# errno and floating-point traps, which nothing reads, would prevent vectorization of loops with roots and selects.
CXX_FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall",
    "-Wno-unknown-pragmas",
)  # fmt: skip
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-Wno-deprecated-gpu-targets")
# Object code for A100, H100/H200 and B200, and PTX for newer GPUs.
ARCHITECTURES = {
    "compute_80": "arch=compute_80,code=[sm_80,compute_80]",
    "compute_90a": "arch=compute_90a,code=sm_90a",
    "compute_100": "arch=compute_100,code=sm_100",
}
TAIL = 30  # lines of compiler output in an error message


class BuildFailed(OpsError):
    """Failed compilation of csrc/; the message has the end of the compiler's output and the path of the whole."""


@dataclass(frozen=True)
class Toolchain:
    """Compilers by path; without `nvcc` the library is C++ only."""

    cxx: str
    nvcc: str | None = None

    @property
    def description(self) -> str:
        """Languages of the library."""
        return "C++ and CUDA" if self.nvcc else "C++"

    def versions(self) -> str:
        """Return the compilers' version texts."""
        return "\n".join(_output([tool, "--version"]) for tool in (self.cxx, self.nvcc) if tool)

    def gencodes(self) -> list[str]:
        """Return nvcc's options for the ARCHITECTURES that it supports."""
        assert self.nvcc is not None, "a toolchain without nvcc has no GPU architectures"
        known = _output([self.nvcc, "--list-gpu-arch"]).split()
        # The list has compute_90 only, which implies 90a.
        return [
            word
            for name, code in ARCHITECTURES.items()
            if name.removesuffix("a") in known
            for word in ("-gencode", code)
        ]


def find_toolchain(path: str | None = None) -> Toolchain | None:
    """Find the compilers on `path` (default: PATH); None without a C++ compiler."""
    cxx = shutil.which("g++", path=path) or shutil.which("c++", path=path)
    return Toolchain(cxx, shutil.which("nvcc", path=path)) if cxx else None


def csrc_directory() -> Path:
    """Return csrc/: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "csrc", package / "csrc"):
        if (folder / "binding.cpp").is_file():
            return folder
    raise OpsError(
        f"the sources of the ops are neither in {package.parent / 'csrc'} nor in {package / 'csrc'}; "
        "install the package again"
    )


def source_hash(csrc: Path) -> str:
    """Return the SHA-256 of names and contents of all sources."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def default_cache_directory() -> Path:
    """Return `megatron_share4v/ops` in the user's cache directory (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_share4v" / "ops"


def build_key(toolchain: Toolchain, csrc: Path) -> str:
    """Return a key of the sources, the flags, the compilers and their versions."""
    flags = json.dumps([CXX_FLAGS, STABLE_ABI, (CUDA_FLAGS, toolchain.gencodes()) if toolchain.nvcc else None])
    parts = (source_hash(csrc), flags, str(toolchain), toolchain.versions())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def find_or_build(toolchain: Toolchain, *, cache: Path, csrc: Path) -> Path:
    """Return the library of `toolchain` from the cache, built now if missing; of several processes one builds.

    Raises BuildFailed; also, without another attempt, when the same build has failed before.
    """
    folder = cache / build_key(toolchain, csrc)
    library, failure = folder / LIBRARY, folder / "failed.log"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpsError(
            f"the ops cannot be built: {folder} cannot be made ({error.strerror}); "
            "point XDG_CACHE_HOME at a writable directory"
        ) from error
    with _locked(folder / "lock"):
        if library.is_file():
            return library
        if failure.is_file():
            raise _failed(toolchain, failure)
        get_logger().info("fused ops: compiling them (%s), once, into %s", toolchain.description, folder)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            try:
                compile_library(toolchain, csrc=csrc, work=Path(name), to=library)
            except CompilerError as error:
                failure.write_text(str(error), encoding="utf-8")
                raise _failed(toolchain, failure) from error
    return library


class CompilerError(Exception):
    """Failed command with its output."""


def compile_library(toolchain: Toolchain, *, csrc: Path, work: Path, to: Path) -> None:
    """Compile every source, in parallel, into `work`, link, and move the finished library to `to`.

    Raises CompilerError.
    """
    jobs = {work / "binding.o": _cxx(toolchain, csrc / "binding.cpp", *_torch_flags(toolchain))}
    jobs |= {work / f"{path.parent.name}_cpu.o": _cxx(toolchain, path) for path in sorted(csrc.glob("*/cpu.cpp"))}
    if toolchain.nvcc:
        cuda = [toolchain.nvcc, "-ccbin", toolchain.cxx, *CUDA_FLAGS, *toolchain.gencodes()]
        jobs |= {
            work / f"{path.parent.name}_cuda.o": [*cuda, "-c", str(path)] for path in sorted(csrc.glob("*/cuda.cu"))
        }
    # Slow compilations first.
    order = sorted(jobs, key=lambda output: not output.stem.endswith(("_cuda", "binding")))
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        outputs = list(pool.map(lambda output: run([*jobs[output], "-o", str(output)]), order))
    linked = work / LIBRARY
    libraries = ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu", "-lc10", "-ldl"]
    # nvcc finds its own run-time library.
    linker = (
        [toolchain.nvcc, "-ccbin", toolchain.cxx, "-shared", "-Xcompiler=-fopenmp"]
        if toolchain.nvcc
        else [toolchain.cxx, "-shared", "-fopenmp"]
    )
    run([*linker, *map(str, jobs), *libraries, "-o", str(linked)])
    # Warnings, and the registers and spills of every CUDA kernel.
    to.with_name("build.log").write_text(
        "\n".join(f"== {output.stem}\n{text}" for output, text in zip(order, outputs, strict=True)), encoding="utf-8"
    )
    os.replace(linked, to)


def prebuild(toolchain: Toolchain, *, csrc: Path, to: Path) -> Path:
    """Build into the directory `to`, with metadata of the sources, for a wheel or a machine image.

    Raises BuildFailed.
    """
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to) as name:
        try:
            compile_library(toolchain, csrc=csrc, work=Path(name), to=to / LIBRARY)
        except CompilerError as error:
            log = to / "failed.log"
            log.write_text(str(error), encoding="utf-8")
            raise _failed(toolchain, log) from error
    metadata = {"sources": source_hash(csrc), "cuda": toolchain.nvcc is not None, "compilers": toolchain.versions()}
    (to / "built.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    return to / LIBRARY


def run(command: list[str]) -> str:
    """Run a command and return its output, both streams. Raises CompilerError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    outputs = done.stdout + done.stderr
    if done.returncode:
        raise CompilerError(f"{' '.join(command)}\nexit code {done.returncode}\n{outputs}")
    return outputs


def _cxx(toolchain: Toolchain, source: Path, *flags: str) -> list[str]:
    return [toolchain.cxx, *CXX_FLAGS, *flags, "-c", str(source)]


def _torch_flags(toolchain: Toolchain) -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return ["-isystem", str(include), STABLE_ABI, *(["-DSHARE4V_CUDA"] if toolchain.nvcc else [])]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # Released by the system when the process ends.
        wait_for_lock(file)
        yield


def _failed(toolchain: Toolchain, log: Path) -> BuildFailed:
    tail = "\n".join(read_text(log).splitlines()[-TAIL:])
    return BuildFailed(
        f"the ops do not compile ({toolchain.description}, {toolchain.cxx}); remove {log} to try again, "
        f"or set ops: reference. It ends:\n{tail}"
    )


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout

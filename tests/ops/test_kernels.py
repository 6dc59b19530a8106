"""CUDA kernels without a GPU: run on the host under AddressSanitizer, and compiled for every GPU.

csrc/emulate runs them on the host; ptxas's register counts are compared with csrc/register_limits.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_share4v.ops.build import (
    LIBRARY,
    STABLE_ABI,
    Toolchain,
    csrc_directory,
    default_cache_directory,
    find_or_build,
    find_toolchain,
)
from megatron_share4v.ops.kernel_usage import KernelUsage, parse_kernel_usage
from tools.op_cases import OPS

TOOLCHAIN = find_toolchain()
needs_cxx = pytest.mark.skipif(TOOLCHAIN is None, reason="no C++ compiler on PATH")
needs_nvcc = pytest.mark.skipif(TOOLCHAIN is None or TOOLCHAIN.nvcc is None, reason="no nvcc on PATH")
HOST_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fsanitize=address",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DSHARE4V_EMULATE",
)
GPUS = {"sm_80", "sm_90a", "sm_100"}


def sanitized() -> dict[str, str]:
    """Environment in which a Python process can load code built with AddressSanitizer."""
    runtime = subprocess.run(
        [TOOLCHAIN.cxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Library whose ops run the CUDA kernels on CPU tensors."""
    csrc, folder = csrc_directory(), tmp_path_factory.mktemp("emulated")
    torch_root = Path(torch.__file__).parent
    compile_one = [TOOLCHAIN.cxx, *HOST_FLAGS, "-c", "-o"]
    run(
        [
            *compile_one,
            str(folder / "binding.o"),
            "-isystem",
            str(torch_root / "include"),
            STABLE_ABI,
            str(csrc / "binding.cpp"),
        ]
    )
    for kernel in sorted(csrc.glob("*/cuda.cu")):
        run([*compile_one, str(folder / f"{kernel.parent.name}.o"), "-x", "c++", str(kernel)])
    objects = map(str, sorted(folder.glob("*.o")))
    library = folder / LIBRARY
    run(
        [
            TOOLCHAIN.cxx,
            "-shared",
            "-fsanitize=address",
            *objects,
            "-L",
            str(torch_root / "lib"),
            "-ltorch_cpu",
            "-lc10",
            "-ldl",
            "-o",
            str(library),
        ]
    )
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def walk(library: Path, *seed: str, env: dict[str, str]) -> str:
    program = Path(__file__).parents[1] / "ops_walk.py"
    done = subprocess.run(
        [sys.executable, str(program), str(library), *seed],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@needs_cxx
def test_emulated_kernels_match_the_reference(emulated: Path) -> None:
    assert f"{sum(1 for op in OPS for _ in op.cases())} cases" in walk(emulated, "2", env=sanitized())


@needs_cxx
def test_cxx_library_matches_the_reference(tmp_path: Path) -> None:
    library = find_or_build(Toolchain(TOOLCHAIN.cxx), cache=tmp_path, csrc=csrc_directory())
    assert "cases" in walk(library, env=os.environ | {"OMP_NUM_THREADS": "1"})


PLANTED = {
    "if (threadIdx.x < 3) __syncthreads();": "divergent barrier",
    "__syncthreads(); if (threadIdx.x == 40) return; __syncthreads();": "divergent barrier",
    "if (threadIdx.x % 2) __shfl_xor_sync(0xffffffffu, 1.0f, 1);": "lanes of this shuffle's mask did not arrive",
    "store<float, 4>(out + 1, load<float, 4>(out));": "misaligned vector access",
    "out[threadIdx.x + 1] = 0.0f;": "heap-buffer-overflow",
    "SHARE4V_DYNAMIC_SHARED(own); own[threadIdx.x + 8] = 0.0f;": "heap-buffer-overflow",
    "__shared__ float own[64]; own[threadIdx.x + 1] = 0.0f; out[0] = own[threadIdx.x];": "global-buffer-overflow",
    "if (threadIdx.x == 5) __trap();": "trap",
    "out[threadIdx.x] = 1.0f;": "",
}


@needs_cxx
def test_planted_faults_are_detected(tmp_path: Path) -> None:
    kernels = "\n".join(
        f"__global__ void kernel{number}(float* out) {{ {body} }}" for number, body in enumerate(PLANTED)
    )
    table = ", ".join(f"kernel{number}" for number in range(len(PLANTED)))
    source = tmp_path / "planted.cu"
    source.write_text(
        f'#include "{csrc_directory()}/common/device.cuh"\n{kernels}\n'
        f"int main(int, char** words) {{\n  void (*kernels[])(float*) = {{{table}}};\n"
        "  float* out = static_cast<float*>(std::malloc(64 * sizeof(float)));\n"
        "  return launch(kernels[std::atoi(words[1])], dim3(2), dim3(64), 64 * sizeof(float), nullptr, out);\n}\n"
    )
    run([TOOLCHAIN.cxx, *HOST_FLAGS, "-x", "c++", str(source), "-o", str(tmp_path / "planted")])
    quiet = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    for number, (body, message) in enumerate(PLANTED.items()):
        done = subprocess.run(
            [str(tmp_path / "planted"), str(number)], capture_output=True, text=True, check=False, timeout=60, env=quiet
        )
        assert (done.returncode == 0) == (not message) and message in done.stderr, f"{body}\n{done.stderr[:2000]}"


@needs_nvcc
def test_kernels_keep_their_register_limits() -> None:
    csrc = csrc_directory()
    # The build that the other tests use.
    log = find_or_build(TOOLCHAIN, cache=default_cache_directory(), csrc=csrc).with_name("build.log").read_text()
    limits = json.loads((csrc / "register_limits.json").read_text())
    found = list(parse_kernel_usage(log))
    assert {usage.op for usage in found} == {path.parent.name for path in csrc.glob("*/cuda.cu")} == set(limits)
    for usage in found:
        named = [registers for name, registers in limits[usage.op].items() if f"{len(name)}{name}" in usage.kernel]
        assert len(named) == 1, f"{usage.op}: give {usage.kernel} one limit in csrc/register_limits.json"
        assert not usage.spilled, f"{usage} spills"
        assert usage.registers <= named[0], f"{usage} is above its limit of {named[0]} registers"
    for op, kernels in limits.items():
        for name in kernels:
            compiled = {usage.gpu for usage in found if usage.op == op and f"{len(name)}{name}" in usage.kernel}
            assert compiled == GPUS, f"{op}: {name} is compiled for {compiled}"


def test_spills_are_seen() -> None:
    entry = (
        "ptxas info    : Compiling entry function '_Z7forwardv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z7forwardv\n"
    )
    spills = (
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 0 barriers\n"
    )
    assert list(parse_kernel_usage(f"== norm_cuda\n{entry}{spills}")) == [
        KernelUsage("norm", "_Z7forwardv", "sm_80", 40, 16)
    ]

"""Build and choice of the library, with three-line sources in place of csrc/.

The compiler is a script that counts its calls.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_share4v.errors import OpsError
from megatron_share4v.ops import backend
from megatron_share4v.ops.backend import LibrarySources, OpsBackend, choose_ops_backend
from megatron_share4v.ops.build import (
    LIBRARY,
    BuildFailed,
    Toolchain,
    csrc_directory,
    find_or_build,
    find_toolchain,
    prebuild,
)

REAL = find_toolchain()
needs_cxx = pytest.mark.skipif(REAL is None, reason="no C++ compiler on PATH")


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    (folder / "answer").mkdir(parents=True)
    (folder / "binding.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int answer() { return 41; }\n'
    )
    (folder / "answer/cpu.cpp").write_text("int nothing() { return 0; }\n")
    return folder


@pytest.fixture
def toolchain(tmp_path: Path) -> Toolchain:
    """g++ that adds a line to `calls` for each call that compiles or links."""
    script = tmp_path / "g++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo called >> "{tmp_path}/calls"\nexec "{REAL.cxx}" "$@"\n')
    script.chmod(0o755)
    return Toolchain(str(script))


@pytest.fixture
def available(tmp_path: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> LibrarySources:
    """Machine without compilers, whose libraries have no ops and are not loaded."""
    monkeypatch.setattr(backend, "load_library", lambda library: None)
    return LibrarySources(toolchain=None, cache=tmp_path / "cache", csrc=csrc, prebuilt=tmp_path / "prebuilt")


def calls(tmp_path: Path) -> int:
    path = tmp_path / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def with_compiler(available: LibrarySources, toolchain: Toolchain | None) -> LibrarySources:
    return LibrarySources(toolchain, available.cache, available.csrc, available.prebuilt)


@needs_cxx
def test_library_is_built_once_per_sources(tmp_path: Path, csrc: Path, toolchain: Toolchain) -> None:
    first = find_or_build(toolchain, cache=tmp_path / "cache", csrc=csrc)
    assert ctypes.CDLL(str(first)).answer() == 41
    assert calls(tmp_path) == 3  # two sources and the link
    assert find_or_build(toolchain, cache=tmp_path / "cache", csrc=csrc) == first
    assert calls(tmp_path) == 3
    source = csrc / "binding.cpp"
    source.write_text(source.read_text().replace("41", "42"))
    second = find_or_build(toolchain, cache=tmp_path / "cache", csrc=csrc)
    assert second != first and ctypes.CDLL(str(second)).answer() == 42


@needs_cxx
def test_eight_processes_build_once(tmp_path: Path, csrc: Path, toolchain: Toolchain) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=find_or_build, args=(toolchain,), kwargs={"cache": tmp_path / "cache", "csrc": csrc})
        for _ in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert calls(tmp_path) == 3
    (folder,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in folder.iterdir()} == {LIBRARY, "build.log", "lock"}


@needs_cxx
def test_failed_build_is_recorded_and_shown(tmp_path: Path, csrc: Path, toolchain: Toolchain) -> None:
    (csrc / "answer/cpu.cpp").write_text("int nothing() { return undeclared_name; }\n")
    with pytest.raises(
        BuildFailed, match=r"do not compile \(C\+\+,(?s:.*)failed.log to try again(?s:.*)undeclared_name"
    ):
        find_or_build(toolchain, cache=tmp_path / "cache", csrc=csrc)
    before = calls(tmp_path)
    with pytest.raises(BuildFailed, match="undeclared_name"):
        find_or_build(toolchain, cache=tmp_path / "cache", csrc=csrc)
    assert calls(tmp_path) == before
    (log,) = (tmp_path / "cache").glob("*/failed.log")
    assert "undeclared_name" in log.read_text()
    log.unlink()
    with pytest.raises(BuildFailed):
        find_or_build(toolchain, cache=tmp_path / "cache", csrc=csrc)
    assert calls(tmp_path) > before


@needs_cxx
def test_unwritable_cache_is_named(tmp_path: Path, csrc: Path, toolchain: Toolchain) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OpsError, match="file.* cannot be made .*XDG_CACHE_HOME"):
        find_or_build(toolchain, cache=tmp_path / "file" / "cache", csrc=csrc)


def test_without_compiler_the_reference_is_used_and_logged(
    available: LibrarySources, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="megatron_share4v"):
        choice = choose_ops_backend("auto", device="cpu", available=available)
    assert choice.implementation == "reference" and choice.library is None
    assert caplog.messages == [
        "fused ops: reference (no C++ compiler (g++, c++) on PATH and no prebuilt library that fits)"
    ]
    assert choose_ops_backend("reference", device="cpu", available=available) == OpsBackend(
        "reference", "as configured"
    )


def test_native_without_compiler_raises_with_the_remedy(available: LibrarySources) -> None:
    with pytest.raises(
        OpsError,
        match=r"ops: native was requested on cpu(?s:.*)no C\+\+ compiler(?s:.*)install g\+\+(?s:.*)ops: reference",
    ):
        choose_ops_backend("native", device="cpu", available=available)


def test_empty_path_has_no_compilers() -> None:
    assert find_toolchain(path="") is None


@needs_cxx
def test_cxx_only_library_supports_only_the_cpu(available: LibrarySources, toolchain: Toolchain) -> None:
    machine = with_compiler(available, toolchain)
    choice = choose_ops_backend("auto", device="cpu", available=machine)
    assert (choice.implementation, choice.reason) == ("native", "C++")
    assert choose_ops_backend("auto", device="cuda", available=machine) == OpsBackend(
        "reference", "no nvcc on PATH and no prebuilt library with CUDA kernels"
    )
    with pytest.raises(OpsError, match="requested on cuda(?s:.*)no nvcc"):
        choose_ops_backend("native", device="cuda", available=machine)


@needs_cxx
def test_cuda_compile_failure_falls_back_to_cxx_with_a_reason(
    tmp_path: Path, available: LibrarySources, toolchain: Toolchain
) -> None:
    (available.csrc / "answer/cuda.cu").write_text("")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\n[ "$1" = --list-gpu-arch ] && exit 0\n'
        "echo out of order >&2\nexit 1\n"
    )
    nvcc.chmod(0o755)
    machine = with_compiler(available, Toolchain(toolchain.cxx, str(nvcc)))
    choice = choose_ops_backend("auto", device="cpu", available=machine)
    assert (
        choice.implementation == "native"
        and "without CUDA kernels" in choice.reason
        and "out of order" in choice.reason
    )
    with pytest.raises(OpsError, match="out of order"):
        choose_ops_backend("native", device="cuda", available=machine)


@needs_cxx
def test_prebuilt_library_is_used_for_its_sources_only(available: LibrarySources, toolchain: Toolchain) -> None:
    prebuild(toolchain, csrc=available.csrc, to=available.prebuilt)
    choice = choose_ops_backend("native", device="cpu", available=available)
    assert choice.library == available.prebuilt / LIBRARY and choice.reason == "prebuilt, C++"
    assert choose_ops_backend("auto", device="cuda", available=available).implementation == "reference"
    assert json.loads((available.prebuilt / "built.json").read_text())["cuda"] is False
    (available.csrc / "binding.cpp").write_text("int other;\n")
    assert choose_ops_backend("auto", device="cpu", available=available).implementation == "reference"


@needs_cxx
def test_loading_twice_is_harmless() -> None:
    choice = choose_ops_backend("native", device="cpu")
    backend.load_library.cache_clear()
    backend.load_library(choice.library)
    assert torch.ops.share4v.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)[0].eq(1).all()


@needs_cxx
def test_invalid_library_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "loaded_libraries", set())
    broken = tmp_path / "broken" / "other.so"
    broken.parent.mkdir()
    broken.write_text("no library")
    with pytest.raises(OpsError, match="other.so cannot be loaded"):
        backend.load_library(broken)


def test_build_tool_status(repository: Path) -> None:
    environment = os.environ | {"PATH": ""}
    tool = repository / "tools/build_ops.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--status"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0 and "compilers: none" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: no C++ compiler") and "Traceback" not in done.stderr


def test_installed_package_carries_the_sources(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    pytest.importorskip("setuptools")
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shipped = tmp_path / "lib/megatron_share4v/csrc"
    wanted = {path.relative_to(csrc_directory()) for path in csrc_directory().rglob("*") if path.is_file()}
    assert {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()} == wanted

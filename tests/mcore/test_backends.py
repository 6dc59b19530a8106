"""All ranks select the same fused ops, build them once, or end with one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_world

from megatron_share4v.ops.build import Toolchain, find_toolchain

REAL = find_toolchain()
needs_cxx = pytest.mark.skipif(REAL is None, reason="no C++ compiler on PATH")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Sources of two lines, and a compiler that records each call that compiles or links."""
    (tmp_path / "csrc/answer").mkdir(parents=True)
    (tmp_path / "csrc/binding.cpp").write_text("int answer() { return 41; }\n")
    (tmp_path / "csrc/answer/cpu.cpp").write_text("int nothing() { return 0; }\n")
    if REAL is not None:
        script = tmp_path / "g++"
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] || echo called >> "{tmp_path}/calls"\nexec "{REAL.cxx}" "$@"\n'
        )
        script.chmod(0o755)
    return tmp_path


def outcome(machine: Path, requested: str, with_compiler: tuple[bool, ...]) -> str:
    """Return a rank's implementation or error, where `with_compiler[rank]` says whether it has a compiler."""
    import torch.distributed as dist

    from megatron_share4v.errors import OpsError
    from megatron_share4v.mcore.backends import select_ops_backend
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.ops import backend
    from megatron_share4v.ops.backend import LibrarySources
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    backend.load_library = lambda library: None  # the library has no ops
    toolchain = Toolchain(str(machine / "g++")) if with_compiler[dist.get_rank()] else None
    available = LibrarySources(toolchain, machine / "cache", machine / "csrc", machine / "prebuilt")
    with open_mesh(Layout(data=dist.get_world_size()), device=Device("cpu")) as mesh:
        try:
            return select_ops_backend(requested, mesh=mesh, available=available).implementation
        except OpsError as error:
            return str(error)


@needs_cxx
def test_four_ranks_build_once(machine: Path) -> None:
    assert run_world(4, outcome, machine, "native", (True,) * 4) == ["native"] * 4
    assert len((machine / "calls").read_text().splitlines()) == 3  # two sources and the link


def test_none_has_a_compiler(machine: Path) -> None:
    assert run_world(2, outcome, machine, "auto", (False,) * 2) == ["reference"] * 2
    first, second = run_world(2, outcome, machine, "native", (False,) * 2)
    assert first == second and first.startswith("ops: native was requested on cpu") and "ranks" not in first


@needs_cxx
@pytest.mark.parametrize("requested", ["auto", "native"])
def test_differing_ranks_end_with_one_message(machine: Path, requested: str) -> None:
    messages = run_world(3, outcome, machine, requested, (True, False, True))
    assert len(set(messages)) == 1, messages
    heading, *ranks = messages[0].splitlines()
    assert (
        heading.startswith(f"ops: {requested} does not lead to the same on every rank; ")
        and "ops: reference" in heading
    )
    assert (
        ranks[0] == "ranks 0, 2: fused ops: native (C++)"
        and ranks[1].startswith("ranks 1: ")
        and "no C++ compiler" in ranks[1]
    )


@needs_cxx
def test_reference_needs_no_compiler(machine: Path) -> None:
    assert run_world(2, outcome, machine, "reference", (True, False)) == ["reference"] * 2
    assert not (machine / "calls").exists()

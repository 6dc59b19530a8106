"""Build the fused ops beforehand, into the cache that every process uses or, with `--output DIR`, into a directory.

tools/build_ops.py                                          this machine's cache, so that no run compiles
tools/build_ops.py --output megatron_share4v/ops/prebuilt   a library for `pip wheel .`
tools/build_ops.py --status                                 compilers, sources and libraries of this machine
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_share4v.errors import OpsError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.ops.backend import REMEDY, LibrarySources, describe_library
from megatron_share4v.ops.build import Toolchain, find_or_build, find_toolchain, prebuild


def main(arguments: list[str] | None = None) -> int:
    """Build the library, or print the status."""
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        if options.status:
            print(describe_library())
            return 0
        toolchain = find_toolchain()
        if toolchain is None:
            raise OpsError(f"no C++ compiler (g++, c++) on PATH. {REMEDY}")
        if options.cpu_only:
            toolchain = Toolchain(toolchain.cxx)
        sources, start = LibrarySources(toolchain=toolchain), time.perf_counter()
        if options.output:
            library = prebuild(toolchain, csrc=sources.csrc, to=options.output)
        else:
            library = find_or_build(toolchain, cache=sources.cache, csrc=sources.csrc)
        print(
            f"{library}: {toolchain.description}, {library.stat().st_size / 1e6:.1f} MB, "
            f"{time.perf_counter() - start:.1f} s"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the library and metadata of its sources here")
    parser.add_argument(
        "--cpu-only", action="store_true", help="build without CUDA kernels even where nvcc is installed"
    )
    parser.add_argument("--status", action="store_true", help="print compilers, sources and libraries; build nothing")
    return parser


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())

"""Write docs/measurements/ops.md: bandwidth floors, compiled resources and measurements of every op.

    tools/bench_ops.py | tee cpu.txt        on this machine
    bash tests/gpu/run.sh                   on a machine with a GPU: runs/gpu/ops_gpu.txt
    tools/report_ops.py --cpu cpu.txt [--gpu runs/gpu/ops_gpu.txt]

Floors are of the shapes of ShareGPT4V-7B. Compiled resources are those of a build with nvcc, made if missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_share4v.errors import OpsError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.files import read_text
from megatron_share4v.ops.build import Toolchain, csrc_directory, default_cache_directory, find_or_build, find_toolchain
from megatron_share4v.ops.kernel_usage import KernelUsage, parse_kernel_usage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: tools/ is no installed package
from tools.op_cases import OPS

COPY_H200 = 4.3e12  # bytes per second of a device-to-device copy on an H200, read and written bytes counted
OUTPUT = Path("docs/measurements/ops.md")


def main(arguments: list[str] | None = None) -> int:
    """Read the results and write the report."""
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        toolchain = find_toolchain()
        if toolchain is None or toolchain.nvcc is None:
            raise OpsError("the report has registers and spills, which nvcc prints; there is no nvcc on PATH")
        library = find_or_build(toolchain, cache=default_cache_directory(), csrc=csrc_directory())
        log = read_text(library.with_name("build.log"))
        measured = {name: _results(path) for name, path in (("cpu", options.cpu), ("gpu", options.gpu)) if path}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        "\n".join(_document(measured, list(parse_kernel_usage(log)), toolchain)) + "\n", encoding="utf-8"
    )
    print(options.output)
    return 0


def _results(path: Path) -> dict:
    """Return the JSON object in the last line of the output of tools/bench_ops.py."""
    lines = read_text(path).splitlines() if path.is_file() else []
    if not lines or not lines[-1].startswith("{"):
        raise OpsError(f"{path} is not the output of tools/bench_ops.py: its last line is not a JSON object")
    return json.loads(lines[-1])


def _document(measured: dict[str, dict], compiled: list[KernelUsage], toolchain: Toolchain) -> Iterator[str]:
    yield "# Fused ops: floors, compiled resources, measurements"
    yield (
        "\nWritten by `tools/report_ops.py`, not by hand. MB and GB are 10^6 and 10^9 bytes; "
        "`fwd+bwd` is both passes together."
    )
    yield "\n## Floors on a GPU\n"
    yield (
        "Bytes that must be read and written at the shapes of ShareGPT4V-7B, and the time for it at "
        f"{COPY_H200 / 1e12:.1f} TB/s, the copy bandwidth"
    )
    yield "of an H200: the lower bound of a memory-bound kernel.\n"
    yield from _floors(measured.get("gpu"))
    yield "\n## Compiled resources\n"
    version = next(line for line in toolchain.versions().splitlines()[::-1] if "release" in line)
    yield (
        f"`-Xptxas -v`, {version}. Ranges are over the instantiations of a kernel (element types, vector widths). "
        "`csrc/register_limits.json` has"
    )
    yield "the limits that `tests/ops/test_kernels.py` checks; a spill fails it.\n"
    yield from _resources(compiled)
    for name, title in (("cpu", "Measured on a CPU"), ("gpu", "Measured on a GPU")):
        yield f"\n## {title}\n"
        yield from _measurement(measured[name]) if name in measured else ["Not measured."]


def _floors(results: dict | None) -> Iterator[str]:
    times = (
        {(row["op"], row["shape"], row["direction"]): row["native_us"] for row in results["rows"]} if results else {}
    )
    rows = []
    for op in OPS:
        for bench in (bench for bench in op.benches() if bench.where == "gpu"):
            passes = {"fwd": bench.bytes_forward}
            if bench.bytes_backward is not None:
                passes["fwd+bwd"] = bench.bytes_forward + bench.bytes_backward
            for direction, size in passes.items():
                time = times.get((op.name, bench.name, direction))
                rows.append(
                    (
                        op.name,
                        bench.name,
                        direction,
                        f"{size / 1e6:.1f}",
                        f"{1e6 * size / COPY_H200:.1f}",
                        f"{time:.1f}" if time else "not measured",
                    )
                )
    yield from _table(("op", "shape", "pass", "MB", "floor µs", "measured µs"), rows)


def _resources(compiled: list[KernelUsage]) -> Iterator[str]:
    gpus = sorted({usage.gpu for usage in compiled}, key=lambda gpu: int("".join(filter(str.isdigit, gpu))))
    limits = json.loads(read_text(csrc_directory() / "register_limits.json"))
    rows = []
    for op, kernels in limits.items():
        for name, limit in kernels.items():
            found = [usage for usage in compiled if usage.op == op and f"{len(name)}{name}" in usage.kernel]
            by_gpu = {gpu: sorted(usage.registers for usage in found if usage.gpu == gpu) for gpu in gpus}
            ranges = [
                f"{registers[0]}\N{EN DASH}{registers[-1]}" if registers else "not compiled"
                for registers in by_gpu.values()
            ]
            rows.append((op, name, len(found) // len(gpus), *ranges, sum(usage.spilled for usage in found), limit))
    yield from _table(
        ("op", "kernel", "instantiations", *(f"registers {gpu}" for gpu in gpus), "bytes spilled", "limit"), rows
    )


def _measurement(results: dict) -> Iterator[str]:
    yield (
        f"`{results['command']}` on {results['date']}: {results['machine']}, {results['threads']} CPU thread(s), "
        f"torch {results['torch']}; {results['ops']};"
    )
    yield f"copy {results['copy_gb_s']:.1f} GB/s. Medians of interleaved calls; ratios above 1: native is faster.\n"
    heading = (
        "op",
        "shape",
        "pass",
        "MB",
        "native µs",
        "eager µs",
        "ratio",
        "torch.compile µs",
        "ratio",
        "GB/s",
        "of copy",
    )
    yield from _table(heading, map(_measured_row, results["rows"]))


def _measured_row(row: dict) -> tuple:
    native, eager, compiled = row["native_us"], row["eager_us"], row["compiled_us"]
    against = (f"{compiled:.0f}", f"{compiled / native:.2f}") if compiled else ("-", "-")
    times = (f"{native:.0f}", f"{eager:.0f}", f"{eager / native:.2f}", *against)
    return (
        row["op"],
        row["shape"],
        row["direction"],
        f"{row['megabytes']:.2f}",
        *times,
        f"{row['gigabytes_per_s']:.1f}",
        f"{row['of_copy']:.2f}",
    )


def _table(heading: tuple[str, ...], rows: Iterable[tuple]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=Path, metavar="FILE", help="output of tools/bench_ops.py on a CPU")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help="its output on a GPU (tests/gpu/run.sh)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return parser


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())

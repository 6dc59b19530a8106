"""Time every fused op against eager torch and torch.compile: medians of interleaved calls.

    tools/bench_ops.py [OP ...]         on the CPU, one thread (or `--threads N`)
    tools/bench_ops.py --device cuda    on the GPU, at the shapes of ShareGPT4V-7B

`MB` is the minimum to read and write. `fwd` is the forward pass without gradients, `fwd+bwd` both passes. `of copy`
is the native bandwidth relative to a plain copy's, measured in the same run. `peak MB` is the peak allocation of one
call without its arguments, results included; its ratio is eager over native; "-" below 0.1 MB. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_share4v.errors import exit_on_closed_output, exit_on_user_error
from megatron_share4v.ops.backend import choose_ops_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: tools/ is no installed package
from tools.op_cases import OPS
from tools.op_cases.record import Bench, OpCases

MIN_ROUNDS, MAX_ROUNDS, SECONDS = 7, 50, 1.0  # per shape and pass, over all variants
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds, None: not measured."""

    op: str
    shape: str
    direction: str
    megabytes: float
    native_us: float
    eager_us: float
    compiled_us: float | None
    gigabytes_per_s: float
    of_copy: float
    native_peak_mb: float
    eager_peak_mb: float

    @property
    def text(self) -> str:
        """Format the line of the table below HEADER."""
        memory = (
            f"{self.native_peak_mb:8.1f} {self.eager_peak_mb / self.native_peak_mb:6.1f}"
            if self.native_peak_mb > 0.1
            else f"{'-':>8} {'-':>6}"
        )
        compiled = (
            f"{self.compiled_us:11.0f} {self.compiled_us / self.native_us:6.2f}"
            if self.compiled_us
            else f"{'-':>11} {'-':>6}"
        )
        return (
            f"{self.op:20} {self.shape:22} {self.direction:8} {self.megabytes:9.2f} {self.native_us:10.0f} "
            f"{self.eager_us:10.0f} {self.eager_us / self.native_us:6.2f} {compiled} {self.gigabytes_per_s:8.1f} "
            f"{self.of_copy:8.2f} {memory}"
        )


HEADER = (
    f"{'op':20} {'shape':22} {'pass':8} {'MB':>9} {'native us':>10} {'eager us':>10} {'ratio':>6} {'compiled us':>11} "
    f"{'ratio':>6} {'GB/s':>8} {'of copy':>8} {'peak MB':>8} {'ratio':>6}"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks and print the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    with exit_on_user_error():
        backend = choose_ops_backend("native", device=options.device)
    where = "gpu" if options.device == "cuda" else "cpu"
    copy = copy_bandwidth(options.device)
    print(
        f"{_machine(options.device)}, {options.threads} thread(s), torch {torch.__version__}; {backend.line}; "
        f"copy {copy:.1f} GB/s\n{HEADER}",
        flush=True,
    )
    rows: list[Row] = []
    for op in OPS:
        for bench in op.benches():
            if bench.where == where and (not options.ops or op.name in options.ops):
                for row in measure(op, bench, device=options.device, compiled=not options.no_compile, copy=copy):
                    print(row.text, flush=True)
                    rows.append(row)
    results = {
        "command": " ".join(["tools/bench_ops.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(options.device),
        "threads": options.threads,
        "torch": torch.__version__,
        "ops": backend.line,
        "copy_gb_s": copy,
    }
    print(json.dumps(results | {"rows": [asdict(row) for row in rows]}))
    return 0


def measure(op: OpCases, bench: Bench, *, device: str, compiled: bool, copy: float) -> list[Row]:
    """Measure the forward pass, and forward with backward where there is one."""
    arguments = bench.make(device)

    native = bench.native or functools.partial(op.function, implementation="native")
    eager = bench.eager or functools.partial(op.function, implementation="reference")
    variants = {"native": native, "eager": eager}
    if compiled and bench.compiles:
        torch.compiler.reset()
        variants["compiled"] = torch.compile(eager, dynamic=False)
    passes = {"fwd": (_forward, bench.bytes_forward)}
    if bench.bytes_backward is not None:
        passes["fwd+bwd"] = (_forward_and_backward, bench.bytes_forward + bench.bytes_backward)
    rows = []
    for direction, (once, size) in passes.items():
        calls = {name: once(variant, arguments, op.differentiable) for name, variant in variants.items()}
        times = medians(calls, device=device)
        peaks = {name: peak_bytes(calls[name], device=device) / 1e6 for name in ("native", "eager")}
        bandwidth = size / times["native"] / 1e9
        microseconds = {name: 1e6 * seconds for name, seconds in times.items()}
        rows.append(
            Row(
                op.name,
                bench.name,
                direction,
                size / 1e6,
                microseconds["native"],
                microseconds["eager"],
                microseconds.get("compiled"),
                bandwidth,
                bandwidth / copy,
                peaks["native"],
                peaks["eager"],
            )
        )
    return rows


def medians(calls: dict[str, Callable[[], Any]], *, device: str) -> dict[str, float]:
    """Return median seconds per call; variants are interleaved, so other load on the machine affects all of them."""
    timed = _time_on_gpu if device == "cuda" else _time_on_cpu
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], Any], *, device: str) -> int:
    """Return the peak allocation of torch during the call, above what was allocated before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Suppress the profiler's start and stop messages, which would interleave with the table.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def copy_bandwidth(device: str) -> float:
    """Measure the bandwidth of a plain copy in GB/s, counting read and written bytes."""
    size = COPY_BYTES[device]
    source, target = (
        torch.zeros(size, dtype=torch.uint8, device=device),
        torch.zeros(size, dtype=torch.uint8, device=device),
    )
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, device=device)["copy"] / 1e9


def _forward(
    variant: Callable[..., Any], arguments: dict[str, Any], differentiable: tuple[str, ...]
) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            variant(**arguments)

    return call


def _forward_and_backward(
    variant: Callable[..., Any], arguments: dict[str, Any], differentiable: tuple[str, ...]
) -> Callable[[], None]:
    leaves = {name: arguments[name].detach().requires_grad_() for name in differentiable}
    outputs = variant(**arguments)
    slopes = [torch.ones_like(output) for output in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]

    def call() -> None:
        outputs = variant(**arguments | leaves)
        torch.autograd.grad(
            [outputs] if isinstance(outputs, torch.Tensor) else list(outputs), list(leaves.values()), slopes
        )

    return call


def _time_on_cpu(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_on_gpu(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine()
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())

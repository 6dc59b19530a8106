"""Registers and spills of the CUDA kernels, parsed from the build log beside a library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class KernelUsage:
    """ptxas's resource usage of one kernel on one GPU."""

    op: str
    kernel: str
    gpu: str
    registers: int
    spilled: int


def parse_kernel_usage(log: str) -> Iterator[KernelUsage]:
    """Yield the kernels of a build log; `kernel` is the mangled name."""
    for section in re.split(r"^== ", log, flags=re.MULTILINE):
        op, _, text = section.partition("_cuda\n")
        for match in re.finditer(
            r"Compiling entry function '(\w+)' for '(\w+)'(.*?)Used (\d+) registers", text, re.DOTALL
        ):
            spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", match[3]))
            yield KernelUsage(op, match[1], match[2], int(match[4]), spilled)

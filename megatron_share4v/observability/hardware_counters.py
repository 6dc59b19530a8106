"""Hardware counters of rank 0's node for TensorBoard: CPU load and memory, and GPU counters where nvidia-smi exists.

A thread polls every PERIOD_S seconds, so training never waits for it.
"""

from __future__ import annotations

import csv
import subprocess
import threading
from collections.abc import Callable

import psutil

from megatron_share4v.logging import get_logger

PERIOD_S = 15.0
GPU_FIELDS = {"utilization.gpu": max, "temperature.gpu": max, "power.draw": max, "clocks.sm": min, "memory.used": max}
"""nvidia-smi field -> how the values of the node's GPUs are reduced to one."""


class HardwareCounters:
    """Polls the counters in a thread and keeps the newest reading."""

    def __init__(self, *, period_s: float = PERIOD_S) -> None:
        self._period_s, self._stopped = period_s, threading.Event()
        self._newest: dict[str, float] = {}
        self._read_gpus: Callable[[], dict[str, float]] = read_gpus
        self._thread = threading.Thread(target=self._run, name="counters", daemon=True)
        self._thread.start()

    def take(self) -> dict[str, float]:
        """Return the newest reading once, as scalars by name; {} until there is another."""
        newest, self._newest = self._newest, {}
        return newest

    def close(self) -> None:
        """Stop polling."""
        self._stopped.set()

    def _run(self) -> None:
        psutil.cpu_percent()
        while not self._stopped.wait(self._period_s):
            try:
                gpus = self._read_gpus()
            except (OSError, subprocess.SubprocessError, ValueError) as problem:
                get_logger().info("hardware counters: host only, since nvidia-smi failed (%s)", problem)
                self._read_gpus = dict
                gpus = {}
            memory = psutil.virtual_memory()
            self._newest = {
                "host/cpu_percent": psutil.cpu_percent(),
                "host/memory_available_gb": memory.available / 1e9,
                **gpus,
            }


def read_gpus() -> dict[str, float]:
    """Read GPU_FIELDS of this node's GPUs. Raises OSError, SubprocessError or ValueError when nvidia-smi fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    columns = list(zip(*csv.reader(text.splitlines(), skipinitialspace=True)))
    if len(columns) != len(GPU_FIELDS):
        raise ValueError(f"{len(columns)} fields of {len(GPU_FIELDS)}")
    readings = {}
    for (name, choose), column in zip(GPU_FIELDS.items(), columns):
        numbers = [float(value) for value in column if value.replace(".", "", 1).isdecimal()]
        if numbers:
            readings[f"gpu/{name.replace('.', '_')}"] = choose(numbers)
    return readings

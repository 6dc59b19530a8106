"""What the hardware of rank 0's node says of itself while training, for TensorBoard: memory and load of the host, and of its GPUs where nvidia-smi is.

A thread asks every PERIOD_S seconds; training waits for nothing.
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
"""What is asked of each GPU, and which of the node's is shown: the hottest, the slowest."""


class Counters:
    """The newest reading."""

    def __init__(self, *, period_s: float = PERIOD_S) -> None:
        self._period_s, self._newest, self._over = period_s, {}, threading.Event()
        self._gpus: Callable[[], dict[str, float]] = read_gpus
        self._thread = threading.Thread(target=self._run, name="counters", daemon=True)
        self._thread.start()

    def take(self) -> dict[str, float]:
        """Scalars by name; each reading is given once, and nothing between two of them."""
        newest, self._newest = self._newest, {}
        return newest

    def close(self) -> None:
        """Ask no more."""
        self._over.set()

    def _run(self) -> None:
        psutil.cpu_percent()
        while not self._over.wait(self._period_s):
            try:
                gpus = self._gpus()
            except (OSError, subprocess.SubprocessError, ValueError) as problem:
                get_logger().info(
                    "hardware counters: of the host alone, since nvidia-smi cannot be asked (%s)", problem
                )
                self._gpus = dict
                gpus = {}
            memory = psutil.virtual_memory()
            self._newest = {
                "host/cpu_percent": psutil.cpu_percent(),
                "host/memory_available_gb": memory.available / 1e9,
                **gpus,
            }


def read_gpus() -> dict[str, float]:
    """GPU_FIELDS over the GPUs of this node. OSError, SubprocessError, ValueError: there is no nvidia-smi, or it says nothing of use."""
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

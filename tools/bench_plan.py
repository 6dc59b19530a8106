"""Benchmark of sample plans for tools/bench_data.py: time and peak memory of each order, packed or not.

Also writes the synthetic index, with lengths like ShareGPT4V's, that bench_packing.py trains on.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from megatron_share4v.config.data import BlendSource
from megatron_share4v.data.sampling.blend import open_index
from megatron_share4v.data.sampling.packing import Packing
from megatron_share4v.data.sampling.sampler import Order, Sampler
from megatron_share4v.data.store.index import ROW, DatasetInfo, write_index

SLOTS, PACK_LENGTH, GLOBAL_BATCH = 576, 4096, 256
PLANS: dict[str, tuple[Order, Packing | None]] = {
    "sequential": ("sequential", None),
    "random": ("random", None),
    "block": ("block", None),
    "group_by_modality_length": ("group_by_modality_length", None),
    "packed random": ("random", Packing(PACK_LENGTH)),
    "packed block": ("block", Packing(PACK_LENGTH)),
    "blend random": ("random", None),
    "blend packed": ("random", Packing(PACK_LENGTH)),
}
"""Order and packing of each measured plan."""


def write_synthetic_index(directory: Path, *, samples: int, seed: int, scale: int = 1) -> None:
    """Write the index of samples like those of stage 2, without shards; all lengths are divided by `scale`.

    94 % have one image; half of the answers are short, half long; text has up to 2048 positions.
    """
    rng = np.random.RandomState(seed)
    short, long = rng.lognormal(4.4, 0.7, samples), rng.lognormal(6.0, 0.6, samples)
    answers = np.where(rng.rand(samples) < 0.5, short, long).clip(5 * scale, 2000).astype(np.int64) // scale
    rows = np.zeros(samples, dtype=ROW)
    rows["n_img"] = rng.rand(samples) < 0.94
    rows["n_tok"] = answers + 45 // scale
    rows["n_lab"] = answers
    rows["words"] = np.where(rows["n_img"], 1, -1) * (answers * 3 // 4 + 1)
    keys = np.arange(samples).astype("S8")
    info = DatasetInfo(
        samples=samples,
        shards=(),
        index_sha256="",
        keys_sha256="",
        tokenizer_fingerprint="",
        template="",
        max_text_length=2048,
        sources={},
    )
    directory.mkdir()
    write_index(directory, rows=rows, keys=keys, info=info)


def bench_plans(samples: int) -> dict[str, dict[str, float]]:
    """Measure and print each plan in its own process.

    Returns seconds from an opened index to the first step and peak memory of the process in bytes.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as name:
        whole, parts = Path(name) / "whole", [Path(name) / f"part{number}" for number in range(4)]
        write_synthetic_index(whole, samples=samples, seed=0)
        for number, part in enumerate(parts):
            write_synthetic_index(part, samples=samples // 4, seed=number)
        for plan in PLANS:
            # One process per plan: the peak memory of a process never falls.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                paths = [str(part) for part in parts] if plan.startswith("blend") else [str(whole)]
                found[plan] = process.submit(measure, plan, paths).result()
            print(
                f"plan {plan:26} {found[plan]['seconds']:6.2f} s  {found[plan]['peak_bytes'] / 2**20:6.0f} MiB",
                flush=True,
            )
    return found


def measure(plan: str, paths: list[str]) -> dict[str, float]:
    """Measure one plan in this process."""
    blend = [BlendSource(path=path, weight=1.0 + number) for number, path in enumerate(paths)]
    index = open_index(paths[0] if len(paths) == 1 else blend)
    order, packing = PLANS[plan]
    started = time.perf_counter(), time.process_time()
    sampler = Sampler(
        index,
        order=order,
        packing=packing,
        group_size=None,
        seed=0,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=8,
        tokens_per_image=SLOTS,
        pad_multiple=8,
    )
    sampler.global_batch(0)
    seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "fill": sampler.fill}

"""The part of tools/bench_data.py that measures plans: how long each kind takes for a data set, and how much memory its process has at most.

Also the synthetic index, with lengths like ShareGPT4V's, that bench_packing.py trains on.
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
from megatron_share4v.data.sampling.sampler import Sampler
from megatron_share4v.data.store.index import ROW, DatasetInfo, write_index

SLOTS, PACK_LENGTH, GLOBAL_BATCH = 576, 4096, 256
PLANS = {
    "sequential": {"order": "sequential"},
    "random": {"order": "random"},
    "block": {"order": "block"},
    "group_by_modality_length": {"order": "group_by_modality_length"},
    "packed random": {"order": "random", "packing": Packing(PACK_LENGTH)},
    "packed block": {"order": "block", "packing": Packing(PACK_LENGTH)},
    "blend random": {"order": "random"},
    "blend packed": {"order": "random", "packing": Packing(PACK_LENGTH)},
}


def write_synthetic_index(directory: Path, *, samples: int, seed: int, scale: int = 1) -> None:
    """Stage-2-like samples without shards: 94 % with one image; half of the answers are short, half long; text up to 2048 positions, all
    divided by `scale`.
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
    """Seconds from an opened index to the first step, and peak memory in bytes of a process that does nothing else, for each plan."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as name:
        whole, parts = Path(name) / "whole", [Path(name) / f"part{number}" for number in range(4)]
        write_synthetic_index(whole, samples=samples, seed=0)
        for number, part in enumerate(parts):
            write_synthetic_index(part, samples=samples // 4, seed=number)
        for plan in PLANS:
            # A fresh process for each: peak memory never falls.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                paths = [str(part) for part in parts] if plan.startswith("blend") else [str(whole)]
                found[plan] = process.submit(measure, plan, paths).result()
            print(
                f"plan {plan:26} {found[plan]['seconds']:6.2f} s  {found[plan]['peak_bytes'] / 2**20:6.0f} MiB",
                flush=True,
            )
    return found


def measure(plan: str, paths: list[str]) -> dict[str, float]:
    """What bench_plans reports of one plan."""
    index = (
        open_index(paths[0])
        if len(paths) == 1
        else open_index([BlendSource(path=path, weight=1.0 + n) for n, path in enumerate(paths)])
    )
    settings = dict(
        group_size=None,
        seed=0,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=8,
        tokens_per_image=SLOTS,
        pad_multiple=8,
    )
    started = time.perf_counter(), time.process_time()
    made = Sampler(index, **settings, **PLANS[plan])
    made.global_batch(0)
    seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "fill": made.fill}

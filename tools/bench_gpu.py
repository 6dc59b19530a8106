"""Benchmark of ShareGPT4V training steps on one GPU against transformers: both stages, packed, BF16 and FP8.

    python tools/bench_gpu.py [--out DIR] [--steps N] [--variants bf16 fp8 ...] [--pretrain YAML --finetune YAML]

FP8 runs by our layers and by Transformer Engine. Each variant runs in its own process, so memory is not shared. Where
all layers do not fit, their number is halved until they do, and the table states it. Model FLOPs count real positions,
images and frozen parts (model/flops.py); MFU is relative to the measured matrix products of this GPU. Writes
training.json, training.md and a trace of one step per variant to DIR. Runs on the CPU at small sizes for tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_gpu_job import OUT_OF_MEMORY, TEXT, Job

from megatron_share4v.config.load import load_run
from megatron_share4v.errors import Share4VError, exit_on_closed_output
from megatron_share4v.mcore.transformer_engine import te_unavailable_reason
from megatron_share4v.ops.fp8_linear import CAPABILITY

JOB_SCRIPT = Path(__file__).with_name("bench_gpu_job.py")
BF16_STATE = ("optim.moments=bf16", "precision.gradients=bf16")
VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8": ("precision.fp8=tensorwise",),
    "te bf16": ("transformer_engine=language", "attention=te"),
    "te fp8 tensorwise": ("transformer_engine=language", "attention=te", "precision.fp8=tensorwise"),
    "te fp8 delayed": ("transformer_engine=language", "attention=te", "precision.fp8=delayed"),
    "te fp8 blockwise": ("transformer_engine=language", "attention=te", "precision.fp8=blockwise"),
    "transformers": (),
    "transformers compiled": (),
}


def measure_peak_tflops(size: int) -> dict[str, float]:
    """Measure TFLOP/s of square matrix products, the reference of the MFU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    products: dict[str, Callable[[], torch.Tensor]] = {"bf16": lambda: left @ right}
    if device.type == "cuda" and torch.cuda.get_device_capability() >= CAPABILITY:
        codes, other, one = (
            left.to(torch.float8_e4m3fn),
            right.t().contiguous().to(torch.float8_e4m3fn),
            torch.ones((), device=device),
        )
        products["fp8"] = lambda: torch._scaled_mm(
            codes, other.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    found = {}
    for name, product in products.items():
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(20):
                product()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - started) / 20)
        found[name] = 2 * size**3 / best / 1e12
    return found


def run_job(job: Job, layers: int) -> dict[str, Any]:
    """Run a job in its own process; halve the layers until the model fits."""
    while True:
        overrides = [*job.overrides, f"model.language.num_layers={layers}"]
        text = json.dumps(asdict(job) | {"overrides": overrides})
        done = subprocess.run([sys.executable, str(JOB_SCRIPT), text], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if done.returncode != OUT_OF_MEMORY or layers == 1:
            return {"refused": (done.stderr.strip().splitlines() or ["no error message"])[-1]}
        layers //= 2


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the peaks, run every job, and write training.json and training.md."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    fixed = [
        "parallel.tensor=1",
        "parallel.pipeline=1",
        "parallel.sequence=false",
        "parallel.overlap_grad_reduce=false",
        "train.micro_batch_size=1",
        "data.order=random",
    ]
    fixed += [
        f"data.pack_length={arguments.pack}",
        f"train.global_batch_size={arguments.packs}",
        "precision.dtype=bf16",
        *BF16_STATE,
        *arguments.set,
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": gpu,
        "torch": torch.__version__,
        "engine": te_unavailable_reason() or "installed",
        "peaks": measure_peak_tflops(arguments.matrix),
        "rows": [],
    }
    print(json.dumps(result), flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for stage in arguments.stages:
        path = getattr(arguments, stage)
        for variant in arguments.variants:
            job = Job(stage, variant, path, [*fixed, *VARIANTS[variant]], arguments.text, arguments.steps, str(out))
            try:
                row = run_job(job, arguments.layers or load_run(path).model.language.num_layers)
            except Share4VError as error:
                row = {"refused": str(error)}
            result["rows"].append({"stage": stage, "variant": variant, **row})
            print(json.dumps(result["rows"][-1] | {"losses": None}), flush=True)
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "training.md").write_text(format_table(result), encoding="utf-8")
    return result


def format_table(result: dict[str, Any]) -> str:
    """Format the results as Markdown for docs/measurements/."""
    peak = result["peaks"]["bf16"]
    lines = [
        f"{result['device']}, torch {result['torch']}; measured peak of matrix products: "
        + ", ".join(f"{name} {value:.0f} TFLOP/s" for name, value in result["peaks"].items()),
        "",
    ]
    lines += [
        "| stage | variant | layers | s/step | tokens/s | TFLOP/s | MFU | peak GB | host syncs | loss against bf16 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = result["rows"]
    references = {row["stage"]: row["losses"] for row in rows if row["variant"] == "bf16" and "losses" in row}
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['stage']} | {row['variant']} | not run: {row['refused']} |||||||||")
            continue
        reference, losses = references.get(row["stage"], []), row["losses"]
        difference = ""
        if not row["variant"].startswith("transformers") and len(reference) == len(losses):
            difference = f"{max(abs(a - b) / b for a, b in zip(losses, reference)):.2%}"
        host_syncs = "" if row["host_waits"] is None else row["host_waits"]
        lines.append(
            f"| {row['stage']} | {row['variant']} | {row['layers']} | {row['seconds']:.3f} "
            f"| {row['tokens_per_s']:,.0f} | {row['model_tflops']:.4g} | {row['model_tflops'] / peak:.1%} "
            f"| {row['peak_memory'] / 1e9:.1f} | {host_syncs} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu/training")
    parser.add_argument("--pretrain", default="examples/share4v_7b/pretrain.yaml")
    parser.add_argument("--finetune", default="examples/share4v_7b/finetune.yaml")
    parser.add_argument("--stages", nargs="+", choices=TEXT, default=list(TEXT))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after three warm-up steps")
    parser.add_argument("--pack", type=int, default=4096)
    parser.add_argument("--packs", type=int, default=4, help="packs (micro-batches) of one step")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers; 0: as many as fit")
    parser.add_argument("--text", type=int, default=0, help="text positions of a sample; 0: the stage's mean")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the square matrices that measure the peak")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the configurations"
    )
    print("\n" + format_table(run_all(parser.parse_args())))


if __name__ == "__main__":
    with exit_on_closed_output():
        main()

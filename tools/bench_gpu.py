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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.images.policy import normalise
from megatron_share4v.data.records import Batch
from megatron_share4v.data.sampling.sampler import GlobalBatch
from megatron_share4v.errors import OpsError, Share4VError, exit_on_user_error
from megatron_share4v.mcore.backends import check_precision, select_attention_backend, select_ops_backend
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.layer_config import DTYPES
from megatron_share4v.mcore.layer_options import layer_options
from megatron_share4v.mcore.optimizer import build_optimizer, wrap_ddp
from megatron_share4v.mcore.transformer_engine import te_unavailable_reason
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.ops.fp8_linear import CAPABILITY
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.step import StepSettings, train_step
from megatron_share4v.train.step_flops import step_flops

TEXT = {"pretrain": (200, 1.0), "finetune": (350, 0.5)}
"""Mean text positions of a sample and the trained share of them, for ShareGPT4V's captions and instructions."""
SHORT = ("optim.moments=bf16", "precision.gradients=bf16")
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
WARM_UP = 3
OUT_OF_MEMORY = 77
SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Job:
    """One variant, measured in its own process."""

    stage: str
    variant: str
    config: str
    overrides: list[str]
    text: int
    steps: int
    out: str


def sizes(job: Job, config: RunConfig) -> tuple[list[int], int, int]:
    """Return (positions of each sample of a pack, text positions, trained text positions)."""
    patches, length = config.model.vision.num_patches, config.data.pack_length
    text = max(2, min(job.text or TEXT[job.stage][0], length - patches))
    return [patches + text] * (length // (patches + text)), text, max(1, int(TEXT[job.stage][1] * (text - 1)))


def make_batches(job: Job, config: RunConfig, *, device: torch.device) -> tuple[list[Batch], GlobalBatch]:
    """Build the micro-batches of a step, one pack each: BOS, an image, random text whose last part is trained."""
    generator = torch.Generator().manual_seed(0)
    vision, length = config.model.vision, config.data.pack_length
    samples, _text, trained = sizes(job, config)
    starts = torch.arange(len(samples)) * samples[0]
    batches = []
    for _ in range(config.train.global_batch_size):
        ids = torch.zeros(1, length, dtype=torch.int64)
        ids[0, : sum(samples)] = torch.randint(
            3, config.model.language.vocab_size, (sum(samples),), generator=generator
        )
        slots = (starts.unsqueeze(1) + 1 + torch.arange(vision.num_patches)).flatten()
        rows = (starts.unsqueeze(1) + samples[0] - 1 - trained + torch.arange(trained)).flatten()
        targets = ids[0, rows + 1]
        ids[0, slots] = 0
        pixels = torch.randint(
            0, 256, (len(samples), vision.image_size, vision.image_size, 3), generator=generator, dtype=torch.uint8
        )
        given = {"token_ids": ids, "image_slots": slots, "pixels": pixels, "target_rows": rows, "targets": targets}
        batches.append(Batch(**{name: tensor.to(device) for name, tensor in given.items()}, segments=(tuple(samples),)))
    count = len(samples) * len(batches)
    items = GlobalBatch(
        0,
        np.arange(count),
        np.full(count, samples[0]),
        length,
        count,
        trained * count,
        np.full(len(batches), len(samples)),
    )
    return batches, items


def ours(job: Job, config: RunConfig, mesh: Mesh) -> tuple[Callable[[], float], bool]:
    """Return (function that trains one step and returns its loss, whether head and loss are fused)."""
    dtype = DTYPES[config.precision.dtype]
    check_precision(config, mesh=mesh)
    attention = select_attention_backend(config.attention, mesh=mesh, packed=True, dtype=dtype)
    ops = select_ops_backend(config.ops, mesh=mesh).implementation
    options = layer_options(
        config.train,
        precision=config.precision,
        transformer_engine=config.transformer_engine,
        attention=attention.implementation,
    )
    bare = build_chunks(config.model, mesh=mesh, parallel=config.parallel, dtype=dtype, ops=ops, options=options)
    with torch.no_grad():
        for name, parameter in bare[0].named_parameters():
            parameter.fill_(1.0) if "norm" in name and name.endswith("weight") else parameter.normal_(0.0, 0.02)
    chunks = wrap_ddp(bare, mesh=mesh, parallel=config.parallel, gradients=config.precision.gradients)
    optimizer = build_optimizer(chunks, config.optim, parallel=config.parallel, dtype=dtype)
    batches, items = make_batches(job, config, device=mesh.device.torch_device)

    settings = StepSettings(mesh=mesh, micro_batch_size=1, clip_grad_norm=1.0)
    data = StepData(items, batches, 0.0)

    def step() -> float:
        return train_step(chunks, optimizer, data, settings=settings, learning_rate_factor=1.0).loss

    return step, ops == "native"


def theirs(job: Job, config: RunConfig, device: torch.device) -> Callable[[], float]:
    """Return the same step with transformers' LLaVA (SDPA) and fused AdamW, one sample per row, in one dtype."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, language, dtype = config.model.vision, config.model.language, DTYPES[config.precision.dtype]
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    image_id = language.vocab_size - 1
    shape = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_hidden_layers=vision.num_layers,
            **{name: getattr(vision, name) for name in names},
        ),
        text_config=LlamaConfig(
            vocab_size=language.vocab_size,
            num_hidden_layers=language.num_layers,
            num_key_value_heads=language.num_key_value_heads,
            max_position_embeddings=language.max_position_embeddings,
            **{name: getattr(language, name) for name in names},
        ),
        image_token_id=image_id,
    )
    torch.set_default_dtype(dtype)
    with device:
        model = LlavaForConditionalGeneration(shape)
    torch.set_default_dtype(torch.float32)
    start = config.model.trainable.vision_from_block
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            parts = name.split(".")
            parameter.requires_grad_(
                start is not None
                and (start < 0 or ("layers" in parts and int(parts[parts.index("layers") + 1]) >= start))
            )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optim.learning_rate, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if job.variant.endswith("compiled") else model
    batches, _ = make_batches(job, config, device=device)
    samples, *_ = sizes(job, config)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            labels = torch.full_like(batch.token_ids, -100)
            labels[0, batch.target_rows + 1] = batch.targets
            ids = batch.token_ids.clone()
            ids[0, batch.image_slots] = image_id
            rows = [x[:, : sum(samples)].view(len(samples), samples[0]) for x in (ids, labels)]
            loss = forward(
                input_ids=rows[0], pixel_values=normalise(batch.pixels, dtype=dtype), labels=rows[1], use_cache=False
            ).loss / len(batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return total

    return step


def measure(job: Job) -> dict[str, Any]:
    """Run one job in this process."""
    config = load_run(job.config, job.overrides)
    device = Device.detect(local_rank=0, local_world_size=1)
    with (
        process_group(World.single_process(), device, timeout_s=600),
        open_mesh(Layout(), device=device) as mesh,
    ):
        if job.variant.startswith("transformers"):
            step, fused = theirs(job, config, device.torch_device), False
        else:
            step, fused = ours(job, config, mesh)
        losses, times = [], []
        for _ in range(WARM_UP + job.steps):
            started = time.perf_counter()
            losses.append(step())
            device.synchronize()
            times.append(time.perf_counter() - started)
        memory, waits = (
            device.peak_memory_bytes(),
            traced(step, Path(job.out) / f"{job.stage} {job.variant}.trace.json", device=device),
        )
    _, items = make_batches(job, config, device=torch.device("cpu"))
    flops = step_flops(
        config,
        items,
        trained_tokens=items.trained_tokens,
        images_per_sample=np.ones(len(items.rows), dtype=int),
        fused_head=fused,
    )
    seconds = statistics.median(times[WARM_UP:])
    return {
        "layers": config.model.language.num_layers,
        "seconds": seconds,
        "tokens_per_s": items.tokens / seconds,
        "model_tflops": flops.model / seconds / 1e12,
        "hardware_tflops": flops.hardware / seconds / 1e12,
        "peak_memory": memory,
        "host_waits": waits,
        "losses": losses,
    }


def traced(step: Callable[[], float], path: Path, *, device: Device) -> int | None:
    """Profile one more step, write its trace to `path`, and return its number of host syncs; None on the CPU."""
    if device.kind == "cpu":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        device.synchronize()
    profile.export_chrome_trace(str(path))
    return sum(event.count for event in profile.key_averages() if event.key in SYNCHRONISING)


def peaks(size: int) -> dict[str, float]:
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


def attempt(job: Job, layers: int) -> dict[str, Any]:
    """Run a job in its own process, with fewer layers until they fit."""
    while True:
        overrides = [*job.overrides, f"model.language.num_layers={layers}"]
        text = json.dumps(asdict(job) | {"overrides": overrides})
        done = subprocess.run([sys.executable, __file__, "--job", text], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if done.returncode != OUT_OF_MEMORY or layers == 1:
            return {"refused": (done.stderr.strip().splitlines() or ["no word"])[-1]}
        layers //= 2


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the peaks, then run every job."""
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
        *SHORT,
        *arguments.set,
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": gpu,
        "torch": torch.__version__,
        "engine": te_unavailable_reason() or "installed",
        "peaks": peaks(arguments.matrix),
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
                row = attempt(job, arguments.layers or load_run(path).model.language.num_layers)
            except Share4VError as error:
                row = {"refused": str(error)}
            result["rows"].append({"stage": stage, "variant": variant, **row})
            print(json.dumps(result["rows"][-1] | {"losses": None}), flush=True)
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "training.md").write_text(table(result), encoding="utf-8")
    return result


def table(result: dict[str, Any]) -> str:
    """Format the results as Markdown for docs/measurements/."""
    peak = result["peaks"]["bf16"]
    lines = [
        f"{result['device']}, torch {result['torch']}; measured peak of products: "
        + ", ".join(f"{name} {value:.0f} TFLOP/s" for name, value in result["peaks"].items()),
        "",
    ]
    lines += [
        "| stage | variant | layers | s/step | tokens/s | TFLOP/s | MFU | peak GB | host waits | loss from bf16 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    truths = {row["stage"]: row["losses"] for row in result["rows"] if row["variant"] == "bf16" and "losses" in row}
    for row in result["rows"]:
        if "refused" in row:
            lines.append(f"| {row['stage']} | {row['variant']} | not run: {row['refused']} |||||||||")
            continue
        truth = truths.get(row["stage"])
        same = truth is not None and not row["variant"].startswith("transformers") and len(truth) == len(row["losses"])
        away = f"{max(abs(a - b) / b for a, b in zip(row['losses'], truth)):.2%}" if same else ""
        lines.append(
            f"| {row['stage']} | {row['variant']} | {row['layers']} | {row['seconds']:.3f} | {row['tokens_per_s']:,.0f} | "
            f"{row['model_tflops']:.4g} | "
            f"{row['model_tflops'] / peak:.1%} | {row['peak_memory'] / 1e9:.1f} | "
            f"{row['host_waits'] if row['host_waits'] is not None else ''} | {away} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="runs/gpu/training")
    parser.add_argument("--pretrain", default="examples/share4v_7b/pretrain.yaml")
    parser.add_argument("--finetune", default="examples/share4v_7b/finetune.yaml")
    parser.add_argument("--stages", nargs="+", choices=TEXT, default=list(TEXT))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after three others")
    parser.add_argument("--pack", type=int, default=4096)
    parser.add_argument("--packs", type=int, default=4, help="packs of one step, one after the other")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers; 0: as many as fit")
    parser.add_argument("--text", type=int, default=0, help="text positions of a sample; 0: the stage's mean")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices that give the peak")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the configurations"
    )
    arguments = parser.parse_args()
    if arguments.job is None:
        print("\n" + table(run_all(arguments)))
        return
    with exit_on_user_error():
        try:
            print(json.dumps(measure(Job(**json.loads(arguments.job)))))
        except torch.cuda.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY)
        except ImportError as error:
            raise OpsError(f"{error}; transformers is in the extra [dev]") from error


if __name__ == "__main__":
    main()

"""One job of tools/bench_gpu.py: measures one variant of a training step in its own process.

    python tools/bench_gpu_job.py JOB

JOB holds the fields of Job as a JSON object. Prints the result as one line of JSON. Exit code OUT_OF_MEMORY if the
model does not fit on the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.records import Batch
from megatron_share4v.data.sampling.sampler import GlobalBatch
from megatron_share4v.errors import OpsError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.mcore.backends import check_precision, select_attention_backend, select_ops_backend
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.layer_config import DTYPES
from megatron_share4v.mcore.layer_options import layer_options
from megatron_share4v.mcore.optimizer import build_optimizer, wrap_ddp
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.step import StepSettings, train_step
from megatron_share4v.train.step_flops import step_flops

TEXT = {"pretrain": (200, 1.0), "finetune": (350, 0.5)}
"""Mean text positions of a sample and the trained fraction of them, for ShareGPT4V's captions and instructions."""
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


def pack_length(config: RunConfig) -> int:
    """Return the positions of a pack, which every job sets."""
    assert config.data.pack_length is not None
    return config.data.pack_length


def pack_shape(job: Job, config: RunConfig) -> tuple[list[int], int, int]:
    """Return (positions of each sample of a pack, text positions, trained text positions)."""
    patches, length = config.model.vision.num_features, pack_length(config)
    text = max(2, min(job.text or TEXT[job.stage][0], length - patches))
    return [patches + text] * (length // (patches + text)), text, max(1, int(TEXT[job.stage][1] * (text - 1)))


def make_batches(job: Job, config: RunConfig, *, device: torch.device) -> tuple[list[Batch], GlobalBatch]:
    """Build the micro-batches of a step, one pack each: BOS, an image, random text whose last part is trained."""
    generator = torch.Generator().manual_seed(0)
    vision, length = config.model.vision, pack_length(config)
    samples, _text, trained = pack_shape(job, config)
    starts = torch.arange(len(samples)) * samples[0]
    batches = []
    for _ in range(config.train.global_batch_size):
        ids = torch.zeros(1, length, dtype=torch.int64)
        ids[0, : sum(samples)] = torch.randint(
            3, config.model.language.vocab_size, (sum(samples),), generator=generator
        )
        slots = (starts.unsqueeze(1) + 1 + torch.arange(vision.num_features)).flatten()
        rows = (starts.unsqueeze(1) + samples[0] - 1 - trained + torch.arange(trained)).flatten()
        targets = ids[0, rows + 1]
        ids[0, slots] = 0
        pixels = torch.randint(
            0, 256, (len(samples), vision.image_size, vision.image_size, 3), generator=generator, dtype=torch.uint8
        )
        ids, slots, pixels, rows, targets = (tensor.to(device) for tensor in (ids, slots, pixels, rows, targets))
        batches.append(Batch(ids, slots, pixels, rows, targets, segments=(tuple(samples),)))
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


def build_megatron_step(job: Job, config: RunConfig, mesh: Mesh) -> tuple[Callable[[], float], bool]:
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


def build_llava(config: RunConfig, image_id: int, device: torch.device) -> Any:
    """Build transformers' LLaVA with the sizes, the data type and the frozen parts of the configuration."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, language, dtype = config.model.vision, config.model.language, DTYPES[config.precision.dtype]
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
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
    return model


def build_transformers_step(job: Job, config: RunConfig, device: torch.device) -> Callable[[], float]:
    """Return the same step with transformers' LLaVA (SDPA) and fused AdamW, one sample per row, in one dtype."""
    dtype, image_id = DTYPES[config.precision.dtype], config.model.language.vocab_size - 1
    model = build_llava(config, image_id, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optim.learning_rate, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if job.variant.endswith("compiled") else model
    batches, _ = make_batches(job, config, device=device)
    samples, *_ = pack_shape(job, config)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            assert batch.token_ids is not None and batch.pixels is not None and batch.targets is not None
            assert batch.image_slots is not None and batch.target_rows is not None
            labels = torch.full_like(batch.token_ids, -100)
            labels[0, batch.target_rows + 1] = batch.targets
            ids = batch.token_ids.clone()
            ids[0, batch.image_slots] = image_id
            rows = [x[:, : sum(samples)].view(len(samples), samples[0]) for x in (ids, labels)]
            pixels = normalise(batch.pixels, dtype=dtype, vision=config.model.vision)
            output = forward(input_ids=rows[0], pixel_values=pixels, labels=rows[1], use_cache=False)
            loss = output.loss / len(batches)
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
            step, fused = build_transformers_step(job, config, device.torch_device), False
        else:
            step, fused = build_megatron_step(job, config, mesh)
        losses, times = [], []
        for _ in range(WARM_UP + job.steps):
            started = time.perf_counter()
            losses.append(step())
            device.synchronize()
            times.append(time.perf_counter() - started)
        memory = device.peak_memory_bytes()
        host_syncs = profile_step(step, Path(job.out) / f"{job.stage} {job.variant}.trace.json", device=device)
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
        "host_waits": host_syncs,
        "losses": losses,
    }


def profile_step(step: Callable[[], float], path: Path, *, device: Device) -> int | None:
    """Profile one more step, write its trace to `path`, and return its number of host syncs; None on the CPU."""
    if device.kind == "cpu":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        device.synchronize()
    profile.export_chrome_trace(str(path))
    return sum(event.count for event in profile.key_averages() if event.key in SYNCHRONISING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="the fields of Job as a JSON object")
    job = Job(**json.loads(parser.parse_args().job))
    with exit_on_user_error():
        try:
            print(json.dumps(measure(job)))
        except torch.cuda.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY)
        except ImportError as error:
            raise OpsError(f"{error}; transformers is in the extra [dev]") from error


if __name__ == "__main__":
    with exit_on_closed_output():
        main()

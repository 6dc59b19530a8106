"""GPU checks of layers against their plain forms: attention kernels on packs, FP8 by our layers and by Transformer
Engine, recomputation, optimizer moments on the host, and no host sync in forward and backward. Prints one line per
check; exit code 1 when one fails. On the CPU, runs the checks that need no GPU.

    python tests/gpu/layers.py [--skip NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.config.model import LanguageConfig, ModelConfig, TrainableConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.precision import PrecisionConfig
from megatron_share4v.config.training import OptimConfig, TrainConfig
from megatron_share4v.data.records import Batch
from megatron_share4v.data.sampling.sampler import GlobalBatch
from megatron_share4v.errors import OpsError
from megatron_share4v.mcore.attention import KERNELS, build_attention_metadata
from megatron_share4v.mcore.backends import choose_attention_backend, select_ops_backend
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.layer_options import layer_options
from megatron_share4v.mcore.optimizer import MegatronOptimizer, build_optimizer, clip_gradients, wrap_ddp
from megatron_share4v.mcore.transformer_engine import te_unavailable_reason
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import initialize_weights
from megatron_share4v.ops.fp8_linear import CAPABILITY
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.step import StepSettings, run_micro_batches

LENGTH, PATCHES = 512, 16
SEGMENTS = ((200, 30, 256), (512,))  # 26 positions of padding
MODEL = ModelConfig(
    vision=VisionConfig(image_size=56, hidden_size=128, intermediate_size=256, num_layers=3, num_attention_heads=2),
    language=LanguageConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
    trainable=TrainableConfig(vision_from_block=1),
)
BF16 = 3e-2
"""Relative tolerance of losses and gradient norms in bf16: 2**-8 per number, through a few layers."""
FP8 = 5e-2
"""Relative tolerance in FP8: factors have errors up to 2**-4 / sqrt(3)."""


@dataclass(frozen=True)
class Found:
    """Losses and gradient norm of some updates of the model."""

    losses: tuple[float, ...]
    norm: float

    def distance(self, other: Found) -> float:
        """Return the largest relative difference."""
        pairs = zip((*self.losses, self.norm), (*other.losses, other.norm))
        return max(abs(a - b) / abs(b) for a, b in pairs)


def batch(device: torch.device) -> Batch:
    """Build two sequences, the first a pack of three samples, with an image in each sample of over 100 positions."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (2, LENGTH), generator=generator)
    slots = torch.cat([start + torch.arange(1, 1 + PATCHES) for start in (0, 230, LENGTH)])
    ids.view(-1)[slots] = 0
    rows = torch.cat([torch.arange(50, 199), torch.arange(205, 228), torch.arange(600, 1000)])
    pixels = torch.randint(0, 256, (3, 56, 56, 3), generator=generator, dtype=torch.uint8)
    targets = torch.randint(1, 1000, (rows.numel(),), generator=generator)
    given = {"token_ids": ids, "image_slots": slots, "pixels": pixels, "target_rows": rows, "targets": targets}
    return Batch(**{name: tensor.to(device) for name, tensor in given.items()}, segments=SEGMENTS)


def build_chunk(
    mesh: Mesh,
    *,
    attention: str = "sdpa",
    train: dict | None = None,
    precision: dict | None = None,
    engine: str = "none",
    optim: dict | None = None,
) -> tuple[torch.nn.Module, MegatronOptimizer]:
    """Build the model with its gradient buffers, and its optimizer."""
    parallel = ParallelConfig(distributed_optimizer=False)
    settings = TrainConfig(global_batch_size=1, **(train or {}))
    options = layer_options(
        settings,
        precision=PrecisionConfig(**(precision or {})),
        transformer_engine=engine,
        attention=attention,
        has_transformer_engine=engine != "none",
    )
    ops = select_ops_backend("auto", mesh=mesh).implementation
    bare = build_chunks(MODEL, mesh=mesh, parallel=parallel, dtype=torch.bfloat16, ops=ops, options=options)
    initialize_weights(bare, seed=1, model=MODEL)
    [chunk] = wrap_ddp(bare, mesh=mesh, parallel=parallel)
    return chunk, build_optimizer(
        [chunk], OptimConfig(learning_rate=1e-3, **(optim or {})), parallel=parallel, dtype=torch.bfloat16
    )


def train_updates(mesh: Mesh, **how: object) -> Found:
    """Return losses before and after two updates and the norm of the first gradient; `how`: options of build_chunk."""
    chunk, optimizer = build_chunk(mesh, **how)
    data, losses = batch(mesh.device.torch_device), []
    for _ in range(3):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = chunk(data) / data.targets.numel()
        loss.backward()
        chunk.finish_grad_sync()
        optimizer.prepare_grads()
        losses.append((float(loss.detach()), float(optimizer.get_grad_norm())))
        clip_gradients(optimizer, max_norm=1.0, norm=losses[-1][1])
        optimizer.step_with_ready_grads()
    return Found(tuple(loss for loss, _ in losses), losses[0][1])


@contextlib.contextmanager
def forbid_host_syncs(device: Device) -> Iterator[None]:
    """Make torch raise on a host sync inside the block; on the CPU, see tests/train/test_host_syncs.py."""
    if device.kind == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(mesh: Mesh) -> str:
    """Check forward and backward of three micro-batches for host syncs, per variant, after one warm-up."""
    variants: dict[str, dict] = {
        "packed": {},
        "recomputed": {"train": {"recompute": "full", "recompute_tower": "full"}},
    }
    lines = []
    try:
        choose_attention_backend("varlen", device=mesh.device.torch_device, packed=True, dtype=torch.bfloat16)
        variants["varlen"] = {"attention": "varlen"}
    except OpsError as error:
        lines.append(f"varlen not here ({error})")
    if mesh.device.kind == "cpu" or torch.cuda.get_device_capability() >= CAPABILITY:
        variants["fp8"] = {"precision": {"fp8": "tensorwise"}}
    if not te_unavailable_reason():
        variants["engine"] = {"engine": "language", "attention": "te", "precision": {"fp8": "tensorwise"}}
    first = batch(mesh.device.torch_device)
    plain = replace(first, image_slots=first.image_slots[:0], pixels=first.pixels[:0])
    data = StepData(GlobalBatch(0, np.arange(4), np.full(4, LENGTH), LENGTH, 6, 0), [first, plain, first], 0.0)
    for name, how in variants.items():
        chunk, _ = build_chunk(mesh, **how)
        settings = StepSettings(mesh=mesh, micro_batch_size=2)
        run_micro_batches([chunk], data, settings=settings, forward_only=False)
        with forbid_host_syncs(mesh.device):
            losses = run_micro_batches([chunk], data, settings=settings, forward_only=False)
        assert len(losses) == 3 and all(float(part.total) > 0 for part in losses)
        lines.append(f"{name} none")
    return ", ".join(lines)


def kernels(mesh: Mesh) -> str:
    """Compare values and gradients of each attention kernel on packs with plain attention in fp32."""
    device, lines = mesh.device.torch_device, []
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(LENGTH, 2, heads, 64, generator=generator).to(device) for heads in (4, 2, 2)]
    slope = torch.randn(LENGTH, 2, 256, generator=generator).to(device)

    def run(kernel: str, dtype: torch.dtype, causal: bool, packed: bool) -> list[torch.Tensor]:
        metadata = build_attention_metadata(
            torch.zeros(LENGTH, 32, device=device), segments=SEGMENTS if packed else None, kernel=kernel
        )
        leaves = [x.to(dtype).requires_grad_() for x in drawn]
        context = KERNELS[kernel](*leaves, metadata=metadata, causal=causal, scale=None)
        return [context, *torch.autograd.grad(context, leaves, slope.to(dtype))]

    for kernel in ("sdpa", "varlen"):
        try:
            choose_attention_backend(kernel, device=device, packed=True, dtype=torch.bfloat16)
        except OpsError as error:
            lines.append(f"{kernel} not here ({error})")
            continue
        for causal in (True, False):
            for packed in (True, False):
                truth = run("math", torch.float32, causal, packed)
                for got, wanted in zip(run(kernel, torch.bfloat16, causal, packed), truth):
                    difference = float((got.detach().float() - wanted.detach()).norm() / wanted.detach().norm())
                    assert difference < 1e-2, (
                        kernel,
                        causal,
                        packed,
                        difference,
                    )  # bf16 error 2**-8, on sums that partly cancel
        lines.append(f"{kernel} equal")
    return ", ".join(lines)


def engine(mesh: Mesh) -> str:
    """Compare Transformer Engine on packs, in bf16 and every FP8 recipe of this GPU, with our layers in bf16."""
    if te_unavailable_reason():
        return f"not here ({te_unavailable_reason()})"
    plain = train_updates(mesh)
    lines = [
        f"attention {_near(train_updates(mesh, attention='te'), plain, BF16)}",
        f"bf16 {_near(train_updates(mesh, engine='all', attention='te'), plain, BF16)}",
    ]
    recipes = ["delayed", "tensorwise", "blockwise"] + ["mxfp8"] * (torch.cuda.get_device_capability() >= (10, 0))
    lines += [
        f"{recipe} {_near(train_updates(mesh, engine='language', precision={'fp8': recipe}), plain, FP8)}"
        for recipe in recipes
    ]
    return ", ".join(lines)


def own_fp8(mesh: Mesh) -> str:
    """Compare all variants of our FP8 layers with bf16."""
    if mesh.device.kind == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        return "not here (no FP8 products)"
    plain = train_updates(mesh)
    variants = {"": {}, "precise ": {"fp8_weight_gradient": "dtype"}, "tower ": {"fp8_tower": True}}
    return ", ".join(
        f"{name}{_near(train_updates(mesh, precision={'fp8': 'tensorwise', **more}), plain, FP8)}"
        for name, more in variants.items()
    )


def recomputation(mesh: Mesh) -> str:
    """Check that recomputed activations equal stored ones."""
    plain = train_updates(mesh)
    variants = (
        {"recompute": "full", "recompute_tower": "full"},
        {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")},
    )
    return ", ".join(
        _near(train_updates(mesh, train=train), plain, 1e-3) for train in variants
    )  # atomic additions of kernels have no fixed order


def optimizer(mesh: Mesh) -> str:
    """Check that moments on the host equal those on the GPU, and bf16 moments are near."""
    plain = train_updates(mesh)
    offloaded, in_bf16 = train_updates(mesh, optim={"offload": True}), train_updates(mesh, optim={"moments": "bf16"})
    return f"host {_near(offloaded, plain, 1e-3)}, bf16 {_near(in_bf16, plain, BF16)}"


def _near(found: Found, plain: Found, limit: float) -> str:
    difference = found.distance(plain)
    assert difference < limit, (found, plain, limit)
    return f"{difference:.1e}"


CHECKS: tuple[Callable[[Mesh], str], ...] = (kernels, waits, recomputation, optimizer, own_fp8, engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", nargs="*", default=[], choices=[check.__name__ for check in CHECKS])
    skipped = parser.parse_args().skip
    device, failed = Device.detect(local_rank=0, local_world_size=1), 0
    with (
        process_group(World.single_process(), device, timeout_s=600),
        open_mesh(Layout(), device=device) as mesh,
    ):
        print(f"layers on {device.describe()}, torch {torch.__version__}")
        for check in CHECKS:
            if check.__name__ in skipped:
                continue
            try:
                print(f"{check.__name__}: {check(mesh)}", flush=True)
            except Exception:
                failed += 1
                print(f"{check.__name__}: FAILED\n{traceback.format_exc()}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

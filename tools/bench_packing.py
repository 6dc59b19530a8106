"""Benchmark of packing against padding for tools/bench_data.py: useful tokens per second of a tiny model.

All variants train samples of one synthetic data set, interleaved, with the same number of positions per micro-batch and
so the same memory. Padding takes samples in random order or grouped by length and pads a step to its longest sample.
All lengths are a ninth of real ones (an image takes 64 positions, not 576), or attention would dominate the tiny model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bench_plan import write_synthetic_index

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.config.model import LanguageConfig, ModelConfig, TrainableConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.training import OptimConfig
from megatron_share4v.data.loading.collate import StageRole, collate
from megatron_share4v.data.records import Batch, Example
from megatron_share4v.data.sampling.blend import BlendedIndex, open_index
from megatron_share4v.data.sampling.packing import Packing
from megatron_share4v.data.sampling.sampler import MicroBatch, Order, Sampler
from megatron_share4v.data.store.index import Index
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.optimizer import build_optimizer, wrap_ddp
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import initialize_weights
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.text.mask import IMAGE_TOKEN_INDEX
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.step import StepSettings, train_step

SCALE, SLOTS, PACK_LENGTH, PACKS, SAMPLES = 9, 64, 456, 2, 4096
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=64, patch_size=8, hidden_size=32, intermediate_size=64, num_layers=2, num_attention_heads=2
    ),
    language=LanguageConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=344,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    ),
    trainable=TrainableConfig(),
)


class Variant:
    """One way to fill micro-batches, with its sampler, model and measurements."""

    def __init__(
        self,
        index: Index | BlendedIndex,
        mesh: Mesh,
        *,
        order: Order,
        size: int,
        micro_batches: int,
        packing: Packing | None,
    ) -> None:
        self.index, self.mesh, self.size = index, mesh, size
        self.sampler = Sampler(
            index,
            order=order,
            packing=packing,
            group_size=None,
            seed=0,
            global_batch_size=micro_batches * size,
            micro_batch_size=size,
            tokens_per_image=SLOTS,
            pad_multiple=8,
        )
        parallel = ParallelConfig(distributed_optimizer=False)
        bare = build_chunks(MODEL, mesh=mesh, parallel=parallel, dtype=torch.float32)
        initialize_weights(bare, seed=0, model=MODEL)
        self.chunks = wrap_ddp(bare, mesh=mesh, parallel=parallel)
        self.optimizer = build_optimizer(
            self.chunks, OptimConfig(learning_rate=1e-4), parallel=parallel, dtype=torch.float32
        )
        self.seconds, self.tokens, self.positions, self.largest_batch = 0.0, 0, 0, 0

    def step(self, step: int) -> None:
        """Train one step; steps after the first, which allocates buffers, are measured."""
        items = self.sampler.global_batch(step)
        batches = [
            _batch(self.index, micro_batch)
            for micro_batch in self.sampler.micro_batches(items, data_rank=0, data_size=1)
        ]
        started = time.process_time()
        settings = StepSettings(mesh=self.mesh, micro_batch_size=self.size, clip_grad_norm=1.0)
        data = StepData(items, batches, 0.0)
        train_step(self.chunks, self.optimizer, data, settings=settings, learning_rate_factor=1.0)
        assert batches[0].token_ids is not None
        self.largest_batch = max(self.largest_batch, batches[0].token_ids.numel())
        if step:
            self.seconds += time.process_time() - started
            self.tokens += items.tokens
            self.positions += items.sequences * items.sequence_length

    def report(self) -> dict[str, float]:
        """Return useful tokens/s of one core, share of useful positions, and most positions of a micro-batch."""
        return {
            "tokens_per_s": self.tokens / self.seconds,
            "useful": self.tokens / self.positions,
            "positions": self.largest_batch,
        }


def bench_packing(*, steps: int = 5, micro_batches: int = 8) -> dict[str, dict[str, float]]:
    """Measure and print each variant; return the reports and the ratio of packed to padded tokens/s."""
    torch.set_num_threads(1)  # the CPU time of one thread is the cost of a step, whatever the load of the machine
    with tempfile.TemporaryDirectory(prefix="bench-packing-") as name, _one_rank() as mesh:
        write_synthetic_index(Path(name) / "data", samples=SAMPLES, seed=0, scale=SCALE)
        index = open_index(str(Path(name) / "data"))
        longest = int((index.rows["n_tok"] + index.rows["n_img"].astype(int) * (SLOTS - 1)).max())
        samples = PACKS * PACK_LENGTH // longest
        variants = {
            "packed": Variant(
                index, mesh, order="random", size=PACKS, micro_batches=micro_batches, packing=Packing(PACK_LENGTH)
            ),
            "padded": Variant(index, mesh, order="random", size=samples, micro_batches=micro_batches, packing=None),
            "grouped": Variant(
                index, mesh, order="group_by_modality_length", size=samples, micro_batches=micro_batches, packing=None
            ),
        }
        for step in range(steps + 1):
            for variant in variants.values():
                variant.step(step)
    found = {name: variant.report() for name, variant in variants.items()}
    for name, report in found.items():
        print(
            f"{name:8} {report['tokens_per_s']:8,.0f} useful tokens/s, "
            f"{100 * report['useful']:5.1f} % of positions useful, up to "
            f"{report['positions']:.0f} positions in a micro-batch of {variants[name].size} "
            f"{'packs' if name == 'packed' else 'samples'}",
            flush=True,
        )
    ratios = {
        f"packed_to_{name}": found["packed"]["tokens_per_s"] / found[name]["tokens_per_s"]
        for name in ("padded", "grouped")
    }
    print(
        ", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items())
        + f"; fill of all packs {100 * variants['packed'].sampler.fill:.1f} %"
    )
    return {**found, "ratios": ratios, "fill": {"packed": variants["packed"].sampler.fill}}


def _batch(index: Index | BlendedIndex, micro_batch: MicroBatch) -> Batch:
    """Build a batch of random tokens with the lengths of the index."""
    generator = torch.Generator().manual_seed(micro_batch.rows[0])
    side, examples = MODEL.vision.image_size, []
    for row in micro_batch.rows:
        entry = index.rows[row]
        ids = torch.randint(3, 1000, (int(entry["n_tok"]),), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[-int(entry["n_lab"]) :] = ids[-int(entry["n_lab"]) :]
        if entry["n_img"]:
            ids[1] = IMAGE_TOKEN_INDEX
        pixels = torch.zeros(int(entry["n_img"]), side, side, 3, dtype=torch.uint8)
        examples.append(Example(key=str(row), name=str(row), input_ids=ids, labels=labels, pixels=pixels))
    role = StageRole(first=True, last=True)
    return collate(
        examples,
        sequence_length=micro_batch.sequence_length,
        tokens_per_image=SLOTS,
        role=role,
        segments=micro_batch.segments,
    )


@contextmanager
def _one_rank() -> Iterator[Mesh]:
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=600),
        open_mesh(Layout(), device=device) as mesh,
    ):
        yield mesh

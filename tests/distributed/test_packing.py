"""Packed sequences train exactly as the same samples one by one, at every kind of layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_world
from tiny import PATCHES, tiny_family, with_tower
from tolerances import PACKED_GRADIENT, PACKED_LOSS

from megatron_share4v.data.loading.collate import StageRole, collate
from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
from megatron_share4v.data.records import Batch, Example
from megatron_share4v.data.sampling.packing import Packing, pack_samples
from megatron_share4v.data.sampling.sampler import GlobalBatch

SAMPLES, MICRO_BATCHES, PACK_LENGTH = 24, 4, 48
KERNELS = ("sdpa", "math")
LAYOUTS = {
    1: [(1, 1, 1, 1, False)],
    2: [(1, 1, 1, 1, False), (1, 2, 1, 1, False), (1, 2, 2, 1, False), (2, 1, 1, 1, True), (1, 1, 1, 2, False)],
    4: [(2, 2, 1, 1, True), (2, 2, 1, 1, False), (2, 1, 1, 2, True), (1, 1, 1, 4, False)],
}
"""(tensor, pipeline, virtual, context, sequence) by world size."""


@dataclass(frozen=True)
class Result:
    """Result of one way to batch the samples, on one rank."""

    loss: float
    gradients: dict[str, torch.Tensor]


def examples(*, image_size: int) -> list[Example]:
    """Samples of 5 to 21 positions; one in four is text only, one in six has no labels."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for number in range(SAMPLES):
        length = int(torch.randint(5, 18, (1,), generator=generator))
        ids = torch.randint(1, 100, (length,), generator=generator)
        images = int(number % 4 != 1)
        if images:
            ids[1] = -200
        labels = ids.clone()
        labels[: length if number % 6 == 5 else 3] = -100
        pixels = torch.randint(0, 256, (images, 16, 16, 3), generator=generator, dtype=torch.uint8)
        pixels = pixels.repeat(1, 2, 2, 1)[:, :image_size, :image_size]
        result.append(Example(key=str(number), name=str(number), input_ids=ids, labels=labels, pixels=pixels))
    return result


def positions(samples: list[Example]) -> np.ndarray:
    return np.array([len(sample.input_ids) + len(sample.pixels) * (PATCHES - 1) for sample in samples])


def micro_batches(*, packed: bool, image_size: int) -> tuple[list[Batch], int, int]:
    """Return (micro-batches, sequence length, sequences per micro-batch)."""
    samples = examples(image_size=image_size)
    lengths = positions(samples)
    both = dict(tokens_per_image=PATCHES, role=StageRole(first=True, last=True))
    if not packed:
        size = int(-(-lengths.max() // 8) * 8)
        per_batch = SAMPLES // MICRO_BATCHES
        cut = [samples[start : start + per_batch] for start in range(0, SAMPLES, per_batch)]
        return [collate(part, sequence_length=size, **both) for part in cut], size, per_batch
    packs = pack_samples(np.arange(SAMPLES), lengths, Packing(length=PACK_LENGTH, window=SAMPLES))
    groups = [packs.rows[start:end].tolist() for start, end in zip(packs.bounds, packs.bounds[1:])]
    assert len(groups) == 8, len(groups)
    batches = []
    for first in range(0, len(groups), 2):
        pair = groups[first : first + 2]
        segments = tuple(tuple(lengths[group].tolist()) for group in pair)
        batches.append(
            collate(
                [samples[row] for group in pair for row in group],
                sequence_length=PACK_LENGTH,
                segments=segments,
                **both,
            )
        )
    return batches, PACK_LENGTH, 2


def train(mesh, parallel, *, packed: bool, family: str, tower: str, kernel: str = "sdpa", seed: int = 1) -> Result:
    """Return loss and gradients of one step."""
    from megatron_share4v.mcore.layer_options import LayerOptions
    from megatron_share4v.mcore.optimizer import wrap_ddp
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.initialize import initialize_weights
    from megatron_share4v.train.data_feed import StepData
    from megatron_share4v.train.step import StepSettings, reduce_losses, run_micro_batches

    model = with_tower(tiny_family(family), tower)
    image_size = model.vision.image_size
    bare = build_chunks(
        model, mesh=mesh, parallel=parallel, dtype=torch.float32, options=LayerOptions(attention=kernel)
    )
    initialize_weights(bare, seed=seed, model=model)
    chunks = wrap_ddp(bare, mesh=mesh, parallel=parallel)
    batches, length, sequences = micro_batches(packed=packed, image_size=image_size)
    items = GlobalBatch(0, np.arange(SAMPLES), positions(examples(image_size=image_size)), length, 0, 0)
    mine = [
        slice_for_context_parallel(
            batch, rank=mesh.coordinates.context, size=mesh.layout.context, sequence_length=length
        )
        for batch in batches[mesh.coordinates.data :: mesh.layout.data]
    ]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    settings = StepSettings(mesh=mesh, micro_batch_size=sequences)
    losses = run_micro_batches(chunks, StepData(items, mine, 0.0), settings=settings, forward_only=False)
    loss, tokens, _ = reduce_losses(losses, settings=settings)
    assert tokens == sum(batch.targets.numel() for batch in batches)
    gradients = {
        f"{number}.{name}": weight.main_grad.clone()
        for number, chunk in enumerate(chunks)
        for name, weight in chunk.named_parameters()
        if weight.requires_grad
    }
    return Result(loss, gradients)


def compare(
    family: str, tower: str, layouts: list[tuple[int, int, int, int, bool]]
) -> list[tuple[tuple, float, float, float]]:
    """Return (layout, loss, loss difference, largest gradient difference) of this rank."""
    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    rows = []
    for tensor, pipeline, virtual, context, sequence in layouts:
        data = dist.get_world_size() // (tensor * pipeline * context)
        layout = Layout(tensor=tensor, pipeline=pipeline, virtual=virtual, context=context, data=data)
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            virtual=virtual,
            context=context,
            sequence=sequence,
            distributed_optimizer=False,
        )
        with open_mesh(layout, device=Device("cpu")) as mesh:
            kind = dict(family=family, tower=tower)
            alone = train(mesh, parallel, packed=False, **kind)
            assert max(float(gradient.abs().max()) for gradient in alone.gradients.values()) > 1e-3
            for kernel in KERNELS:
                packed = train(mesh, parallel, packed=True, kernel=kernel, **kind)
                gradient = max(
                    float((alone.gradients[name] - packed.gradients[name]).abs().max()) for name in alone.gradients
                )
                rows.append(((kernel, str(layout), sequence), packed.loss, abs(alone.loss - packed.loss), gradient))
    return rows


@pytest.mark.parametrize(
    ("world", "family", "tower"),
    [(1, "all", "siglip"), (1, "plain", "dinov2"), (2, "all", "clip"), (4, "plain", "clip")],
)
def test_packed_training_equals_training_one_by_one(world: int, family: str, tower: str) -> None:
    for rows in run_world(world, compare, family, tower, LAYOUTS[world]):
        for layout, loss, loss_difference, gradient_difference in rows:
            print(layout, loss_difference, gradient_difference)
            assert 4.0 < loss < 5.5
            assert loss_difference <= PACKED_LOSS and gradient_difference <= PACKED_GRADIENT, (
                layout,
                loss_difference,
                gradient_difference,
            )

"""Benchmark of one training step against transformers' LLaVA with torch's AdamW: same shapes and batch, interleaved.

Prints the median step time of each and the ratio of tokens per second. Stage-1 work: captions of mixed length; the
second half of the tower, the projector and the language model train. Needs transformers (extra [dev]).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.config.model import LanguageConfig, ModelConfig, TrainableConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.training import OptimConfig
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.records import Batch
from megatron_share4v.errors import exit_on_closed_output
from megatron_share4v.mcore.backends import select_ops_backend
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.optimizer import build_optimizer, wrap_ddp
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import initialize_weights
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.train.data_feed import StepData
from megatron_share4v.train.step import StepSettings, train_step

IMAGE_ID = 31999
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=224, patch_size=16, hidden_size=384, intermediate_size=1536, num_layers=12, num_attention_heads=6
    ),
    language=LanguageConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    ),
    trainable=TrainableConfig(vision_from_block=6),
)


def make_batch(*, samples: int, seed: int) -> tuple[Batch, torch.Tensor]:
    """Build a micro-batch of captions of 40 to 120 tokens, and its labels [B, S] in transformers' form."""
    generator = torch.Generator().manual_seed(seed)
    slots = MODEL.vision.num_features
    lengths = torch.randint(40, 121, (samples,), generator=generator).tolist()
    size = -(-(1 + slots + max(lengths)) // 8) * 8
    ids = torch.zeros(samples, size, dtype=torch.int64)
    labels = torch.full((samples, size), -100)
    for row, length in enumerate(lengths):
        caption = torch.randint(3, IMAGE_ID, (length,), generator=generator)
        ids[row, 0] = 1
        ids[row, 1 + slots : 1 + slots + length] = caption
        labels[row, 1 + slots : 1 + slots + length] = caption
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    rows = (shifted.flatten() != -100).nonzero().flatten()
    image_slots = (torch.arange(samples).unsqueeze(1) * size + torch.arange(1, 1 + slots)).flatten()
    side = MODEL.vision.image_size
    pixels = torch.randint(0, 256, (samples, side, side, 3), generator=generator, dtype=torch.uint8)
    batch = Batch(
        token_ids=ids, image_slots=image_slots, pixels=pixels, target_rows=rows, targets=shifted.flatten()[rows]
    )
    return batch, labels


def build_megatron_step(batch: Batch, mesh: Mesh) -> Callable[[], float]:
    """Return a function that trains one step and returns its loss."""
    from megatron_share4v.data.sampling.sampler import GlobalBatch

    parallel = ParallelConfig(distributed_optimizer=False)
    ops = select_ops_backend("auto", mesh=mesh).implementation
    chunks = build_chunks(MODEL, mesh=mesh, parallel=parallel, dtype=torch.float32, ops=ops)
    initialize_weights(chunks, seed=0, model=MODEL)
    wrapped = wrap_ddp(chunks, mesh=mesh, parallel=parallel)
    optimizer = build_optimizer(wrapped, OptimConfig(learning_rate=1e-4), parallel=parallel, dtype=torch.float32)
    assert batch.token_ids is not None and batch.targets is not None  # make_batch fills all fields
    samples, size = batch.token_ids.shape
    items = GlobalBatch(
        step=0,
        rows=torch.arange(samples).numpy(),
        lengths=torch.full((samples,), size).numpy(),
        sequence_length=size,
        images=samples,
        trained_tokens=batch.targets.numel(),
    )

    settings = StepSettings(mesh=mesh, micro_batch_size=samples, clip_grad_norm=1.0)
    data = StepData(items, [batch], 0.0)

    def step() -> float:
        return train_step(wrapped, optimizer, data, settings=settings, learning_rate_factor=1.0).loss

    return step


def build_transformers_step(batch: Batch, labels: torch.Tensor) -> Callable[[], float]:
    """Return the same step with transformers and torch.optim.AdamW."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, language = MODEL.vision, MODEL.language
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            intermediate_size=vision.intermediate_size,
            num_attention_heads=vision.num_attention_heads,
        ),
        text_config=LlamaConfig(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.intermediate_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_key_value_heads,
            max_position_embeddings=language.max_position_embeddings,
        ),
        image_token_id=IMAGE_ID,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    first_trained = MODEL.trainable.vision_from_block
    assert first_trained is not None  # part of the tower trains
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            parts = name.split(".")
            trains = "layers" in parts and int(parts[parts.index("layers") + 1]) >= first_trained
            parameter.requires_grad_(trains)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    assert batch.token_ids is not None and batch.pixels is not None  # make_batch fills all fields
    pixels = batch.pixels
    ids = batch.token_ids.clone()
    ids.view(-1)[batch.image_slots] = IMAGE_ID

    # Right padding needs no mask under causal attention; without a mask, transformers selects its fastest kernel.
    def step() -> float:
        optimizer.zero_grad()
        loss = model(
            input_ids=ids,
            pixel_values=normalise(pixels, dtype=torch.float32, vision=MODEL.vision),
            labels=labels,
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4, help="micro-batch size")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch, labels = make_batch(samples=arguments.samples, seed=0)
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=600),
        open_mesh(Layout(), device=device) as mesh,
    ):
        steps_by_name = {
            "transformers": build_transformers_step(batch, labels),
            "megatron_share4v": build_megatron_step(batch, mesh),
        }
        times: dict[str, list[float]] = {name: [] for name in steps_by_name}
        for round_number in range(arguments.steps + 2):
            for name, step in steps_by_name.items():
                started = time.perf_counter()
                loss = step()
                if round_number >= 2:  # the first two rounds warm caches and create optimizer state
                    times[name].append(time.perf_counter() - started)
                print(f"round {round_number}: {name:<18} loss {loss:.4f}", flush=True)
    assert batch.token_ids is not None and batch.targets is not None  # make_batch fills all fields
    tokens = batch.token_ids.numel()
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<18} median {median:.3f} s/step, {tokens / median:,.0f} positions/s")
    ratio = statistics.median(times["transformers"]) / statistics.median(times["megatron_share4v"])
    setting = f"{arguments.threads} threads, {batch.targets.numel()} of {tokens} positions carry a label"
    print(f"ratio of tokens per second, megatron_share4v / transformers: {ratio:.2f} ({setting})")


if __name__ == "__main__":
    with exit_on_closed_output():
        main()

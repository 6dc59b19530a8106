"""The whole model against transformers' LlavaForConditionalGeneration, tiny and random, at several layouts.

Compares tower features, projected features, logits of every position, loss, and the gradient of every parameter. The
vocabulary (99) is not a multiple of its padding, queries are grouped.

N: images; P: patches; B: samples; S: positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from tolerances import FP32_MODULE

from megatron_share4v.checkpoint.hf.weight_map import LLAVA_IN_MEMORY, to_megatron
from megatron_share4v.config.model import LanguageConfig, ModelConfig, TrainableConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.run import Ops
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.records import Batch
from megatron_share4v.mcore.backends import select_ops_backend
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.optimizer import wrap_ddp
from megatron_share4v.mcore.schedule import run_schedule
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import fill_parameters, iter_shards
from megatron_share4v.model.loss import loss_and_divisor
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.layout import Layout

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_layers=4, num_attention_heads=4
    ),
    language=LanguageConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=5000.0,
        rms_norm_eps=1e-6,
        vocab_multiple=64,
    ),
    trainable=TrainableConfig(vision_from_block=-1),
)
IMAGE_TOKEN = 98
LENGTH, SAMPLES = 16, 2
LAYOUTS = {
    "tensor 1": ParallelConfig(),
    "tensor 2": ParallelConfig(tensor=2),
    "tensor 2, sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline 2": ParallelConfig(pipeline=2),
    "pipeline 2, virtual 2": ParallelConfig(pipeline=2, virtual=2),
    "tensor 2, sequence, pipeline 2": ParallelConfig(tensor=2, sequence=True, pipeline=2),
}
QUANTITIES = ("features", "projected", "logits", "loss", "gradients")


def _reference_model() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, language = MODEL.vision, MODEL.language
    tower = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.layer_norm_eps,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_key_value_heads,
        max_position_embeddings=language.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        rms_norm_eps=language.rms_norm_eps,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN)
    )
    with torch.no_grad():
        # Larger than initial weights, with norms other than one and biases other than zero, so that every mistake
        # shows.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with inputs, weights under our names, and everything that transformers computes from them."""
    model = _reference_model()
    patches = MODEL.vision.num_patches
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (SAMPLES, 16, 16, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, IMAGE_TOKEN, (SAMPLES, LENGTH), generator=generator)
    starts = (1, 5)
    for sample, start in enumerate(starts):
        tokens[sample, start : start + patches] = IMAGE_TOKEN
    labels = tokens.clone()
    labels[0, :8], labels[1, :11] = -100, -100
    images = normalise(pixels, dtype=torch.float32)
    tower = model.model.vision_tower(images, output_hidden_states=True)
    features = tower.hidden_states[MODEL.vision.feature_layer][:, 1:]
    output = model(input_ids=tokens, pixel_values=images, labels=labels)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    path = tmp_path_factory.mktemp("llava") / "reference.pt"
    torch.save(
        {
            "pixels": pixels,
            "tokens": tokens,
            "labels": labels,
            "weights": to_megatron(model.state_dict(), MODEL, naming=LLAVA_IN_MEMORY),
            "features": features.detach(),
            "projected": model.model.multi_modal_projector(features).detach(),
            "logits": output.logits.detach(),
            "loss": output.loss.detach(),
            "gradients": to_megatron(gradients, MODEL, naming=LLAVA_IN_MEMORY),
        },
        path,
    )
    return path


def _micro_batch(reference: dict[str, torch.Tensor], samples: slice) -> Batch:
    tokens, labels, pixels = (reference[name][samples] for name in ("tokens", "labels", "pixels"))
    flat = tokens.flatten()
    slots = (flat == IMAGE_TOKEN).nonzero().flatten()
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()
    rows = (following != -100).nonzero().flatten()
    return Batch(
        token_ids=flat.index_fill(0, slots, 0).view_as(tokens),
        image_slots=slots,
        pixels=pixels,
        target_rows=rows,
        targets=following[rows],
    )


def _relative(actual: torch.Tensor, baseline: torch.Tensor) -> float:
    assert actual.shape == baseline.shape, (actual.shape, baseline.shape)
    assert actual.isfinite().all(), "NaN would hide in a maximum"
    return ((actual - baseline).abs().max() / baseline.abs().max()).item()


@torch.no_grad()
def _logits(chunk: Share4V, batch: Batch, mesh: Mesh) -> torch.Tensor | None:
    """Return [B, S, vocabulary] on the last stage, sending hidden states between stages explicitly."""
    neighbours = dist.get_process_group_ranks(mesh.groups.pp)
    here = mesh.coordinates.pipeline
    if not mesh.is_first_stage:
        held = LENGTH // mesh.layout.tensor if chunk.config.sequence_parallel else LENGTH
        received = torch.empty(held, SAMPLES, MODEL.language.hidden_size)
        dist.recv(received, src=neighbours[here - 1])
        chunk.set_input_tensor(received)
    part = chunk.forward_logits(replace(batch, target_rows=torch.arange(SAMPLES * LENGTH)))
    if not mesh.is_last_stage:
        dist.send(part.contiguous(), dst=neighbours[here + 1])
        return None
    parts = [torch.empty_like(part) for _ in range(mesh.layout.tensor)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tp_group)
    padded = torch.cat(parts, dim=1)
    assert torch.isneginf(padded[:, MODEL.language.vocab_size :]).all()
    return padded[:, : MODEL.language.vocab_size].view(SAMPLES, LENGTH, -1)


def _forward_differences(chunk: Share4V, reference: dict, mesh: Mesh) -> dict[str, float]:
    found = {}
    whole = _micro_batch(reference, slice(None))
    if mesh.is_first_stage:
        with torch.no_grad():
            features = chunk.vision(whole.pixels).transpose(0, 1)
            found["features"] = _relative(features, reference["features"])
            found["projected"] = _relative(chunk.encode_images(whole.pixels), reference["projected"])
    logits = _logits(chunk, whole, mesh)
    if logits is not None:
        found["logits"] = _relative(logits, reference["logits"])
    return found


def differences(path: Path, parallel: ParallelConfig, ops: Ops) -> dict[str, float]:
    """Return the largest relative difference of each quantity that this rank holds."""
    reference = torch.load(path)
    layout = Layout.for_world(parallel, world_size=dist.get_world_size())
    with open_mesh(layout, device=Device("cpu")) as mesh:
        implementation = select_ops_backend(ops, mesh=mesh).implementation
        chunks = build_chunks(MODEL, mesh=mesh, parallel=parallel, dtype=torch.float32, ops=implementation)
        fill_parameters(chunks, lambda name, shape: reference["weights"][name])
        found = _forward_differences(chunks[0], reference, mesh) if parallel.virtual == 1 else {}
        records = run_schedule(
            wrap_ddp(chunks, mesh=mesh, parallel=parallel),
            [_micro_batch(reference, slice(sample, sample + 1)) for sample in range(SAMPLES)],
            mesh=mesh,
            sequence_length=LENGTH,
            micro_batch_size=1,
            loss_function=_loss_function,
            forward_only=False,
        )
        if records:
            found["loss"] = _relative(
                sum(total for total, _ in records) / sum(count for _, count in records), reference["loss"]
            )
        # With gradients in place of the weights, iter_shards yields gradients.
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.main_grad
        found["gradients"] = max(
            _relative(shard.data, shard.slice_from(reference["gradients"][shard.key])) for shard in iter_shards(chunks)
        )
    return found


def _loss_function(batch: Batch):
    def finish(total: torch.Tensor) -> tuple:
        tokens = batch.targets.numel()
        return *loss_and_divisor(total, tokens=tokens, whole=tokens, first=True, normalize="tokens"), (
            total.detach(),
            tokens,
        )

    return finish


@pytest.mark.parametrize(
    ("name", "ops"),
    [*((name, "auto") for name in LAYOUTS), *((name, "reference") for name in ("tensor 1", list(LAYOUTS)[-1]))],
)
def test_equals_transformers(name: str, ops: Ops, reference: Path) -> None:
    """Run with native ops where there is a compiler, and with their references."""
    parallel = LAYOUTS[name]
    found: dict[str, float] = {}
    for rank in run_world(parallel.tensor * parallel.pipeline, differences, reference, parallel, ops):
        for quantity, difference in rank.items():
            found[quantity] = max(found.get(quantity, 0.0), difference)
    expected = QUANTITIES if parallel.virtual == 1 else ("loss", "gradients")
    assert set(found) == set(expected)
    assert all(difference <= FP32_MODULE for difference in found.values()), found

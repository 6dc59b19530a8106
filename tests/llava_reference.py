"""transformers' LLaVA as reference: everything that it computes for two samples, compared at any layout.

Compares tower features, projected features, logits of every position, loss, and the gradient of every parameter.

N: images; F: features; B: samples; S: positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_share4v.checkpoint.hf.weight_map import LLAVA_IN_MEMORY, to_megatron
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.run import Ops
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

LENGTH, SAMPLES = 16, 2
QUANTITIES = ("features", "projected", "logits", "loss", "gradients")


def write_reference(path: Path, hf_model: Any, model: ModelConfig) -> Path:
    """Write inputs, weights under our names, and what transformers' model computes; `model` describes it."""
    count, side, image = model.vision.num_features, model.vision.image_size, hf_model.config.image_token_index
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (SAMPLES, side, side, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, image, (SAMPLES, LENGTH), generator=generator)
    for sample, start in enumerate((1, 5)):
        tokens[sample, start : start + count] = image
    labels = tokens.clone()
    labels[0, :8], labels[1, :11] = -100, -100
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.vision.image_mean, model.vision.image_std))
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    output = hf_model(input_ids=tokens, pixel_values=images, labels=labels)
    output.loss.backward()
    features = _features(hf_model, images, model).detach()
    gradients = {name: parameter.grad for name, parameter in hf_model.named_parameters() if parameter.grad is not None}
    weights = dict(hf_model.named_parameters())  # a tied head is not among them
    torch.save(
        {
            "model": model,
            "image": image,
            "pixels": pixels,
            "tokens": tokens,
            "labels": labels,
            "weights": to_megatron({n: w.detach() for n, w in weights.items()}, model, naming=LLAVA_IN_MEMORY),
            "features": features,
            "projected": hf_model.model.multi_modal_projector(features).detach(),
            "logits": output.logits.detach(),
            "loss": output.loss.detach(),
            "gradients": to_megatron(gradients, model, naming=LLAVA_IN_MEMORY),
        },
        path,
    )
    return path


def _features(hf_model: Any, images: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Return what the projector gets: [N, F, V]."""
    states = hf_model.model.vision_tower(images, output_hidden_states=True).hidden_states
    first = int(model.vision.feature_select == "default")
    return torch.cat([states[number][:, first:] for number in model.vision.feature_layers], dim=-1)


def _micro_batch(reference: dict[str, Any], samples: slice) -> Batch:
    tokens, labels, pixels = (reference[name][samples] for name in ("tokens", "labels", "pixels"))
    flat = tokens.flatten()
    slots = (flat == reference["image"]).nonzero().flatten()
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
def _logits(chunk: Share4V, batch: Batch, mesh: Mesh, model: ModelConfig) -> torch.Tensor | None:
    """Return [B, S, vocabulary] on the last stage, sending hidden states between stages explicitly."""
    neighbours = dist.get_process_group_ranks(mesh.groups.pp)
    here = mesh.coordinates.pipeline
    if not mesh.is_first_stage:
        held = LENGTH // mesh.layout.tensor if chunk.config.sequence_parallel else LENGTH
        received = torch.empty(held, SAMPLES, model.language.hidden_size)
        dist.recv(received, src=neighbours[here - 1])
        chunk.set_input_tensor(received)
    part = chunk.forward_logits(replace(batch, target_rows=torch.arange(SAMPLES * LENGTH)))
    if not mesh.is_last_stage:
        dist.send(part.contiguous(), dst=neighbours[here + 1])
        return None
    parts = [torch.empty_like(part) for _ in range(mesh.layout.tensor)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tp_group)
    padded = torch.cat(parts, dim=1)
    assert torch.isneginf(padded[:, model.language.vocab_size :]).all()
    return padded[:, : model.language.vocab_size].view(SAMPLES, LENGTH, -1)


def _forward_differences(chunk: Share4V, reference: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    found = {}
    whole = _micro_batch(reference, slice(None))
    if mesh.is_first_stage:
        with torch.no_grad():
            features = chunk.vision(whole.pixels).transpose(0, 1)
            found["features"] = _relative(features, reference["features"])
            found["projected"] = _relative(chunk.encode_images(whole.pixels), reference["projected"])
    logits = _logits(chunk, whole, mesh, reference["model"])
    if logits is not None:
        found["logits"] = _relative(logits, reference["logits"])
    return found


def find_differences(path: Path, parallel: ParallelConfig, ops: Ops) -> dict[str, float]:
    """Return the largest relative difference of each quantity that this rank holds."""
    reference = torch.load(path, weights_only=False)
    layout = Layout.for_world(parallel, world_size=dist.get_world_size())
    with open_mesh(layout, device=Device("cpu")) as mesh:
        implementation = select_ops_backend(ops, mesh=mesh).implementation
        chunks = build_chunks(reference["model"], mesh=mesh, parallel=parallel, dtype=torch.float32, ops=implementation)
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

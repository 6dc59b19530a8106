"""A small engine and requests for it; spawned worlds import it by name."""

from __future__ import annotations

import dataclasses

import torch
from tiny import PATCHES, tiny_family

VOCABULARY, EOS = 100, 2


def build(mesh, *, seed: int = 2, scale: float = 3.0, family: str = "plain"):
    """The tiny model, with weights large enough that answers depend on the prompt, and biases other than zero."""
    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.initialize import initialize_weights

    parallel = ParallelConfig(tensor=mesh.layout.tensor, pipeline=mesh.layout.pipeline, virtual=mesh.layout.virtual)
    model = tiny_family(family)
    chunks = build_chunks(model, mesh=mesh, parallel=parallel, dtype=torch.float32)
    initialize_weights(chunks, seed=seed, model=model)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
                elif family != "plain":
                    parameter.add_(torch.linspace(-0.03, 0.03, parameter.numel()))
            chunk.eval()
    return chunks


def engine_of(chunks, **options):
    """Engine on the chunks; `options` are EngineConfig's."""
    from megatron_share4v.config.engine import EngineConfig
    from megatron_share4v.infer.engine import Engine

    return Engine(chunks[0], config=EngineConfig(**options), vocabulary=VOCABULARY, stop_ids=frozenset({EOS}))


def prompt(
    seed: int, *, length: int = 20, images: int = 1, image_seed: int | None = None, text_seed: int | None = None
):
    """A prompt with `images` images; text and images from their own seeds where given."""
    from megatron_share4v.data.loading.prompt import Prompt

    text = torch.Generator().manual_seed(seed if text_seed is None else text_seed)
    picture = torch.Generator().manual_seed(seed if image_seed is None else image_seed)
    ids = torch.randint(3, VOCABULARY, (length + images * PATCHES,), generator=text)
    slots = torch.cat(
        [torch.arange(3, 3 + PATCHES) + number * (PATCHES + 2) for number in range(images)]
        or [torch.zeros(0, dtype=torch.int64)]
    )
    ids[slots] = 0
    pixels = torch.randint(0, 256, (images, 16, 16, 3), generator=picture, dtype=torch.uint8)
    return Prompt(token_ids=ids, image_slots=slots, pixels=pixels)


def mixed_prompts(count: int = 6):
    """Prompts with one, no or two images and of different lengths."""
    return [prompt(seed, length=8 + 5 * seed % 23, images=(1, 0, 2)[seed % 3]) for seed in range(count)]


def ask(engine, prompts, *, alone: bool = False, **options) -> list[list[int]]:
    """Answers to all prompts, batched or one by one. `seeds`: one per request."""
    from megatron_share4v.infer.request import GenerationRequest, SamplingParams

    seeds = options.pop("seeds", [None] * len(prompts))
    requests = [
        GenerationRequest(
            f"r{number}", given, dataclasses.replace(SamplingParams(**{"max_new_tokens": 12, **options}), seed=seed)
        )
        for number, (given, seed) in enumerate(zip(prompts, seeds))
    ]
    groups = [[request] for request in requests] if alone else [requests]
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    for group in groups:
        for request in group:
            engine.add(request)
        for event in drain(engine):
            if event.token_id is not None:
                answers[event.request_id].append(event.token_id)
    return list(answers.values())


def drain(engine) -> list:
    """Step until there is no work; returns all events."""
    events = []
    while engine.has_work:
        events += engine.step()
    return events

"""Greedy generation that recomputes the whole sequence for each token: the reference for the inference engine.

Slow, short, and at any layout.

S: positions; B: prompts; N: images; P: patches per image; H: language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_share4v.data.loading.context_parallel import slice_for_context_parallel
from megatron_share4v.data.loading.prompt import Prompt
from megatron_share4v.data.records import Batch
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.optimizer import gather_updated_params, unwrap_model
from megatron_share4v.mcore.schedule import run_schedule
from megatron_share4v.model.share4v import Share4V


@torch.no_grad()
def greedy_generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    *,
    mesh: Mesh,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    vocabulary: int,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, up to and without its first stop token. Collective.

    Every rank passes the same prompts and gets the same answers. Prompts run as one batch, right-padded, which causal
    attention never sees. Only ids below `vocabulary` are chosen: a model may have more ids than its tokenizer, and a
    model that has learned little would pick them.
    """
    gather_updated_params(chunks)
    device = mesh.device.torch_device
    lengths = [prompt.token_ids.numel() for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    features = _encode_prompt_images(chunks, prompts, mesh=mesh)
    multiple = mesh.layout.tensor * mesh.layout.context * 8
    for _ in range(max_new_tokens):
        longest = max(length + len(answer) for length, answer in zip(lengths, answers))
        size = -(-longest // multiple) * multiple
        batch = _batch(prompts, answers, size=size, mesh=mesh)
        logits = _next_logits(chunks, batch, features, mesh=mesh, size=size, count=len(prompts), device=device)
        next_ids = _select_next_ids(logits, mesh=mesh, count=len(prompts), vocabulary=vocabulary)
        for row in list(unfinished):
            if next_ids[row] in stop_ids:
                unfinished.discard(row)
            else:
                answers[row].append(next_ids[row])
        if not unfinished:
            break
    return answers


def _encode_prompt_images(
    chunks: Sequence[torch.nn.Module], prompts: Sequence[Prompt], *, mesh: Mesh
) -> torch.Tensor | None:
    """Image features of all prompts, computed once: [N, P, H] on the first stage, None elsewhere or without images."""
    if not mesh.is_first_stage:
        return None
    pixels = torch.cat([prompt.pixels for prompt in prompts]).to(mesh.device.torch_device)
    first: Share4V = unwrap_model(chunks[0])
    return first.encode_images(pixels) if pixels.size(0) else None


def _batch(prompts: Sequence[Prompt], answers: list[list[int]], *, size: int, mesh: Mesh) -> Batch:
    """Batch of the prompts with their answers so far; `target_rows` is the last position of each."""
    ids = torch.zeros(len(prompts), size, dtype=torch.int64)
    last = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        sequence = torch.cat([prompt.token_ids, torch.tensor(answer, dtype=torch.int64)])
        ids[row, : sequence.numel()] = sequence
        last.append(row * size + sequence.numel() - 1)
    slots = torch.cat([prompt.image_slots + row * size for row, prompt in enumerate(prompts)])
    device = mesh.device.torch_device
    return Batch(
        token_ids=ids.to(device),
        image_slots=slots.to(device),
        pixels=None,
        target_rows=torch.tensor(last, device=device),
        targets=None,
    )


def _next_logits(
    chunks: Sequence[torch.nn.Module],
    batch: Batch,
    features: torch.Tensor | None,
    *,
    mesh: Mesh,
    size: int,
    count: int,
    device: torch.device,
) -> torch.Tensor | None:
    """This TP rank's columns of the logits after the last tokens, [B, vocab / TP], on the last stage.

    None elsewhere.
    """

    def keep_logits(_: Batch) -> Any:
        return lambda logits: (logits.sum(), torch.zeros((), dtype=torch.int, device=device), logits)

    def forward_logits(chunk: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return unwrap_model(chunk).forward_logits(batch, features=features)

    # The interleaved schedule needs a multiple of the pipeline ranks as micro-batches; the first one's logits are used.
    repeats = mesh.layout.pipeline if mesh.layout.virtual > 1 else 1
    context, ranks = mesh.coordinates.context, mesh.layout.context
    part = slice_for_context_parallel(batch, rank=context, size=ranks, sequence_length=size)
    records = run_schedule(
        chunks,
        [part] * repeats,
        mesh=mesh,
        sequence_length=size,
        micro_batch_size=count,
        loss_function=keep_logits,
        forward_only=True,
        call=forward_logits,
    )
    if not mesh.is_last_stage or ranks == 1:
        return records[0].contiguous() if records else None
    assert batch.target_rows is not None, "_batch sets it"
    # Each CP rank has the logits of last tokens in its own part of the sequence.
    logits = records[0].new_zeros(count, records[0].size(1))
    logits[batch.target_rows % size // (size // ranks) == context] = records[0]
    dist.all_reduce(logits, group=mesh.cp_group)
    return logits


def _select_next_ids(logits: torch.Tensor | None, *, mesh: Mesh, count: int, vocabulary: int) -> list[int]:
    """Return the most likely ids, on every rank."""
    chosen = torch.zeros(count, dtype=torch.int64, device=mesh.device.torch_device)
    if logits is not None:
        parts = [torch.empty_like(logits) for _ in range(mesh.layout.tensor)]
        dist.all_gather(parts, logits, group=mesh.tp_group)
        chosen = torch.cat(parts, dim=-1)[:, :vocabulary].argmax(dim=-1)
    if mesh.layout.pipeline > 1:
        dist.broadcast(chosen, src=dist.get_global_rank(mesh.groups.pp, mesh.layout.pipeline - 1), group=mesh.groups.pp)
    return chosen.tolist()

"""Seconds and bytes of the pieces of a step, from shapes, a GPU's data sheet and stated assumptions. Collectives are counted as rings.

n positions of a micro-batch on a rank, W width of the language model, T tensor ranks; a ring over k ranks sends (k - 1) / k of what it gathers or scatters.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_share4v.model.flops import Flops, layer_weights, trained_blocks
from megatron_share4v.planner.case import Case
from megatron_share4v.planner.memory import Chunk, tensors
from megatron_share4v.planner.schedule import Kind

FP32_SHARE = 1 / 15  # of the BF16 peak: plain fp32 products use no tensor cores (H100: 67 of 989 TFLOP/s)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one step, by axis; of the pipeline rank that sends most."""

    tensor: float
    context: float
    pipeline: float
    data: float
    """Between all ranks that hold the same weights."""


def ring(ranks: int) -> float:
    """Share that each rank sends."""
    return (ranks - 1) / ranks


def stage_seconds(case: Case, stage: int, kind: Kind) -> float:
    """One pass of one micro-batch through a stage, its tensor-parallel messages included."""
    chunk, of = case.chunk(stage), case.work
    assumed, forward = case.assumptions, kind == "forward"
    between, least = _layer_bytes(case, forward) / _bandwidth(case), assumed.layer_s * (1 if forward else 2)
    plain = max(_work_seconds(case, of.layer, forward) + between, least)
    seconds = (chunk.layers - len(chunk.fp8)) * plain
    if chunk.fp8:
        in_fp8 = (
            _work_seconds(case, of.layer, forward, fp8=True) + between + _cast_bytes(case, forward) / _bandwidth(case)
        )
        seconds += len(chunk.fp8) * max(in_fp8, least)
    if chunk.first:
        tower = _work_seconds(case, of.tower + of.projector, forward) + _tower_bytes(case, forward) / _bandwidth(case)
        blocks = case.config.model.vision.num_built_layers if forward else trained_blocks(case.config.model)
        seconds += max(tower, blocks * assumed.layer_s * (1 if forward else 2)) if case.workload.images else 0.0
    if chunk.last:
        seconds += _work_seconds(case, of.head, forward)
    if not forward:  # each micro-batch adds its gradients, made in the weights' type, to the buffer
        seconds += _trained(case, chunk) * 2 * (case.kept.element + case.gradient) / _bandwidth(case)
    for axes, (sent, calls) in (
        (1, tensor_bytes(case, chunk, forward)),
        (case.layout.context, context_bytes(case, chunk)),
    ):
        link = case.gpu.link if case.layout.tensor * axes <= case.gpu.per_server else case.gpu.network
        seconds += sent / (link * assumed.links) + calls * assumed.collective_s
    return seconds


def _bandwidth(case: Case) -> float:
    return case.gpu.bandwidth * case.assumptions.memory


def _work_seconds(case: Case, work: Flops, forward: bool, *, fp8: bool = False) -> float:
    """Products at their share of the peak, which narrow matrices lower. `fp8`: of FP8's, but for a weight gradient that is to be precise, and for
    attention."""
    peak = case.gpu.bf16 * (1.0 if case.kept.element == 2 else FP32_SHARE)
    narrowest = min(case.config.model.language.hidden_size / case.layout.tensor, case.micro_batch.positions)
    wide = narrowest / (narrowest + 64)
    products, attention = (
        (work.forward, work.attention_forward) if forward else (work.backward, work.attention_backward)
    )
    plain = (
        products
        if not fp8
        else work.forward
        if case.kept.fp8.precise and not forward and case.config.model.trainable.language
        else 0.0
    )
    seconds = plain / (peak * case.assumptions.matrices * wide) + attention / (peak * case.assumptions.attention)
    if fp8:
        seconds += (products - plain) / ((case.gpu.fp8 or peak) * case.assumptions.fp8 * wide)
    return seconds / case.layout.tensor


def _cast_bytes(case: Case, forward: bool) -> float:
    """Read and written around a decoder layer's FP8 products: what goes in is read for its scale and again for its codes, written as they are and
    transposed; backward the gradients of what came out in the same way. Weights are cast for every micro-batch by ours, by Transformer Engine once
    in a step."""
    language, kept = case.config.model.language, case.kept
    e, n, width, inner = kept.element, case.micro_batch.positions, language.hidden_size, language.intermediate_size
    grouped = language.num_key_value_heads * width // language.num_attention_heads
    ins = n * (2 * width + (width + inner) / kept.tensor)
    outs = n * (2 * width + (width + 2 * grouped + 2 * inner) / kept.tensor)
    weights = layer_weights(case.config.model) / kept.tensor * (2 * e + 1 if forward else e + 1)
    return (ins if forward else outs) * (2 * e + 2) + weights / (case.micro_batches if kept.fp8.engine else 1)


def _layer_bytes(case: Case, forward: bool) -> float:
    """Read and written between the products of a decoder layer: two norms, two residual sums, rotation, SwiGLU; twice as much backward."""
    language, kept = case.config.model.language, case.kept
    n = case.micro_batch.positions
    rows = n / (kept.tensor if kept.sequence else 1)
    grouped = language.num_key_value_heads * language.hidden_size // language.num_attention_heads
    values = 10 * rows * language.hidden_size + n / kept.tensor * (
        2 * (language.hidden_size + grouped) + 3 * language.intermediate_size
    )
    return kept.element * values * (1 if forward else 2)


def _tower_bytes(case: Case, forward: bool) -> float:
    vision, kept = case.config.model.vision, case.kept
    tokens = case.micro_batch.images * (vision.num_patches + 1)
    values = tokens * (10 * vision.hidden_size + 2 * vision.intermediate_size / kept.tensor)
    return kept.element * values * (vision.num_built_layers if forward else 2 * trained_blocks(case.config.model))


def _trained(case: Case, chunk: Chunk) -> int:
    return sum(
        elements * count * trains
        for elements, count, trains in tensors(case.config.model, chunk, tensor=case.layout.tensor)
    )


def tensor_bytes(case: Case, chunk: Chunk, forward: bool) -> tuple[float, int]:
    """(bytes that a rank sends, collectives) of one pass: two all-reduces per layer, or as many gathers and scatters under sequence parallelism."""
    model, kept, amounts = case.config.model, case.kept, case.micro_batch
    if kept.tensor == 1:
        return 0.0, 0
    language, share = model.language, ring(kept.tensor) * kept.element
    whole = amounts.positions * language.hidden_size * share
    again = (
        kept.sequence and not forward and model.trainable.language
    )  # the inputs of two matrices are gathered once more for their gradients
    sent, calls = chunk.layers * whole * (6 if again else 4), chunk.layers * (6 if again else 4 if kept.sequence else 2)
    if chunk.first:
        blocks = model.vision.num_built_layers if forward else trained_blocks(model)
        sent += blocks * 4 * amounts.images * (model.vision.num_patches + 1) * model.vision.hidden_size * share
        sent += (2 * whole + 2 * amounts.images * model.vision.num_patches * language.hidden_size * share) * forward
        calls += 2 * blocks + 2 * forward
    if chunk.last:
        sent += whole * forward * kept.sequence + 2 * amounts.head_rows * language.hidden_size * ring(
            kept.tensor
        ) * 4 * (not forward)
        calls += 3
    return sent, calls


def context_bytes(case: Case, chunk: Chunk) -> tuple[float, int]:
    """(bytes that a rank sends, collectives) of one pass, of either kind: queries, keys and values to attention, its result back."""
    language, kept, ranks = case.config.model.language, case.kept, case.layout.context
    if ranks == 1:
        return 0.0, 0
    grouped = (
        kept.head_copies(case.config.model)
        * language.num_key_value_heads
        * language.hidden_size
        // language.num_attention_heads
    )
    values = case.micro_batch.positions / kept.tensor * (2 * language.hidden_size + 2 * grouped)
    return chunk.layers * values * kept.element * ring(ranks), 2 * chunk.layers


def message_bytes(case: Case) -> float:
    """Of one micro-batch from a stage to the next."""
    rows = case.micro_batch.positions / (case.layout.tensor if case.kept.sequence else 1)
    return rows * case.config.model.language.hidden_size * case.kept.element


def message_seconds(case: Case) -> float:
    """Of one micro-batch from a stage to the next. Neighbouring stages are tensor x context x data ranks apart."""
    if case.layout.pipeline == 1:
        return 0.0
    link = case.gpu.link if case.layout.world_size <= case.gpu.per_server else case.gpu.network
    return message_bytes(case) / (link * case.assumptions.links) + case.assumptions.collective_s


def data_bytes(case: Case, trained: float) -> tuple[float, float]:
    """(to reduce gradients, to gather weights) that a rank with so many trained weights sends in a step."""
    share, sharded = ring(case.replicas), case.config.parallel.distributed_optimizer
    return trained * case.gradient * share * (1 if sharded else 2), trained * case.kept.element * share * sharded


def data_link(case: Case) -> float:
    """Of one rank among those with the same weights. A ring enters and leaves a server through as many ports as the group has ranks there."""
    per_server = max(1, case.gpu.per_server // case.layout.tensor)
    if case.replicas <= per_server:
        return case.gpu.link
    return min(case.gpu.link, case.gpu.network * per_server)


def update_seconds(case: Case, trained: float) -> float:
    """Clearing gradients, their norm, and AdamW: gradient, fp32 weight and two averages read, these three and the weight written."""
    mine = trained / (case.replicas if case.config.parallel.distributed_optimizer else 1)
    moved = case.gradient * trained + mine * (2 * case.gradient + 8 + 2 * case.moments + case.kept.element)
    brought = (
        mine * case.moments / case.assumptions.host if case.config.optim.offload else 0.0
    )  # and taken back at the same time
    return max(moved / _bandwidth(case), brought)


def trained_weights(case: Case, rank: int) -> int:
    """On a pipeline rank."""
    return sum(_trained(case, case.chunk(stage)) for stage in case.stages(rank))


def traffic(case: Case) -> Traffic:
    """By axis, of the pipeline rank that sends most."""
    ranks = range(case.layout.pipeline)
    tensor = max(
        sum(
            tensor_bytes(case, case.chunk(stage), forward)[0]
            for stage in case.stages(rank)
            for forward in (True, False)
        )
        for rank in ranks
    )
    context = max(sum(2 * context_bytes(case, case.chunk(stage))[0] for stage in case.stages(rank)) for rank in ranks)
    stages = len(case.counts)
    sends = max(sum((stage < stages - 1) + (stage > 0) for stage in case.stages(rank)) for rank in ranks)
    return Traffic(
        tensor=tensor * case.micro_batches,
        context=context * case.micro_batches,
        pipeline=sends * message_bytes(case) * case.micro_batches if stages > 1 else 0.0,
        data=max(sum(data_bytes(case, trained_weights(case, rank))) for rank in ranks),
    )

"""Seconds and bytes of the parts of a step, from shapes, the GPU's data sheet and stated assumptions.

Collectives are rings.

n positions of a micro-batch on a rank, W width of the language model, T tensor ranks; a ring over k ranks sends (k - 1)
/ k of what it gathers or scatters.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_share4v.model.flops import Flops, layer_weights, trained_blocks
from megatron_share4v.planner.case import Case
from megatron_share4v.planner.memory import Chunk, weight_shapes
from megatron_share4v.planner.schedule import Kind

FP32_SHARE = 1 / 15  # of the BF16 peak: plain fp32 products use no tensor cores (H100: 67 of 989 TFLOP/s)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per step, by parallel axis, on the pipeline rank that sends most."""

    tensor: float
    context: float
    pipeline: float
    data: float
    """Bytes between all ranks with the same weights (DP and CP)."""


def ring_fraction(ranks: int) -> float:
    """Fraction of the data that each rank of a ring sends."""
    return (ranks - 1) / ranks


def stage_seconds(case: Case, stage: int, kind: Kind) -> float:
    """Time of one pass of one micro-batch through a stage, TP and CP communication included."""
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
        seconds += _trained(case, chunk) * 2 * (case.settings.element + case.gradient) / _bandwidth(case)
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
    """Time of matrix products at their fraction of the peak, which narrow matrices lower.

    fp8: products run at the FP8 peak, except weight gradients that stay in the compute type, and attention.
    """
    peak = case.gpu.bf16 * (1.0 if case.settings.element == 2 else FP32_SHARE)
    narrowest = min(case.config.model.language.hidden_size / case.layout.tensor, case.micro_batch.positions)
    wide = narrowest / (narrowest + 64)
    products, attention = (
        (work.forward, work.attention_forward) if forward else (work.backward, work.attention_backward)
    )
    plain = (
        products
        if not fp8
        else work.forward
        if case.settings.fp8.precise and not forward and case.config.model.trainable.language
        else 0.0
    )
    seconds = plain / (peak * case.assumptions.matrices * wide) + attention / (peak * case.assumptions.attention)
    if fp8:
        seconds += (products - plain) / ((case.gpu.fp8 or peak) * case.assumptions.fp8 * wide)
    return seconds / case.layout.tensor


def _cast_bytes(case: Case, forward: bool) -> float:
    """Bytes read and written by the casts of a decoder layer's FP8 products.

    Inputs are read for their scale and again for their codes, which are written as they are and transposed; output
    gradients likewise in the backward pass. Our layers cast weights for every micro-batch, Transformer Engine once per
    step.
    """
    language, settings = case.config.model.language, case.settings
    e, n, width, inner = settings.element, case.micro_batch.positions, language.hidden_size, language.intermediate_size
    ins = n * (2 * width + (language.query_width + inner) / settings.tensor)
    outs = n * (2 * width + (language.query_width + 2 * language.key_width + 2 * inner) / settings.tensor)
    weights = layer_weights(case.config.model) / settings.tensor * (2 * e + 1 if forward else e + 1)
    return (ins if forward else outs) * (2 * e + 2) + weights / (case.micro_batches if settings.fp8.engine else 1)


def _layer_bytes(case: Case, forward: bool) -> float:
    """Bytes read and written between the products of a decoder layer: two norms, two residual sums, RoPE, norms of
    queries and keys, SwiGLU; twice as many backward.
    """
    language, settings = case.config.model.language, case.settings
    n = case.micro_batch.positions
    rows = n / (settings.tensor if settings.sequence else 1)
    turned = (2 + 2 * language.qk_norm) * (language.query_width + language.key_width)
    values = 10 * rows * language.hidden_size + n / settings.tensor * (turned + 3 * language.intermediate_size)
    return settings.element * values * (1 if forward else 2)


def _tower_bytes(case: Case, forward: bool) -> float:
    vision, settings = case.config.model.vision, case.settings
    tokens, whole = case.micro_batch.images * vision.num_positions, 14 if vision.layer_scale else 10
    values = tokens * (whole * vision.hidden_size + 2 * vision.intermediate_size / settings.tensor)
    return settings.element * values * (vision.num_built_layers if forward else 2 * trained_blocks(case.config.model))


def _trained(case: Case, chunk: Chunk) -> int:
    return sum(
        elements * count * trains
        for elements, count, trains in weight_shapes(case.config.model, chunk, tensor=case.layout.tensor)
    )


def tensor_bytes(case: Case, chunk: Chunk, forward: bool) -> tuple[float, int]:
    """Return (bytes sent per rank, collectives) of one pass: two all-reduces per layer, or all-gathers and
    reduce-scatters with sequence parallelism.
    """
    model, settings, amounts = case.config.model, case.settings, case.micro_batch
    if settings.tensor == 1:
        return 0.0, 0
    language, share = model.language, ring_fraction(settings.tensor) * settings.element
    whole = amounts.positions * language.hidden_size * share
    again = (
        settings.sequence and not forward and model.trainable.language
    )  # the inputs of two matrices are gathered once more for their gradients
    sent, calls = (
        chunk.layers * whole * (6 if again else 4),
        chunk.layers * (6 if again else 4 if settings.sequence else 2),
    )
    if chunk.first:
        blocks = model.vision.num_built_layers if forward else trained_blocks(model)
        sent += blocks * 4 * amounts.images * model.vision.num_positions * model.vision.hidden_size * share
        projected = amounts.images * model.vision.num_features * language.hidden_size * share
        pairs = -(-model.projector.depth // 2)  # of column- and row-parallel layers
        sent += (2 * whole + 2 * projected * pairs) * forward
        calls += 2 * blocks + (1 + pairs) * forward
    if chunk.last:
        sent += whole * forward * settings.sequence + 2 * amounts.head_rows * language.hidden_size * ring_fraction(
            settings.tensor
        ) * 4 * (not forward)
        calls += 3
    return sent, calls


def context_bytes(case: Case, chunk: Chunk) -> tuple[float, int]:
    """Return (bytes sent per rank, collectives) of one forward or backward pass: all-to-all of queries, keys, values
    and the attention output.
    """
    language, settings, ranks = case.config.model.language, case.settings, case.layout.context
    if ranks == 1:
        return 0.0, 0
    copied = settings.head_copies(case.config.model) * language.key_width
    values = case.micro_batch.positions / settings.tensor * 2 * (language.query_width + copied)
    return chunk.layers * values * settings.element * ring_fraction(ranks), 2 * chunk.layers


def message_bytes(case: Case) -> float:
    """Bytes of one micro-batch sent from a stage to the next."""
    rows = case.micro_batch.positions / (case.layout.tensor if case.settings.sequence else 1)
    return rows * case.config.model.language.hidden_size * case.settings.element


def message_seconds(case: Case) -> float:
    """Time to send one micro-batch to the next stage. Neighbouring stages are tensor x context x data ranks apart."""
    if case.layout.pipeline == 1:
        return 0.0
    return message_bytes(case) / _stage_bandwidth(case) + case.assumptions.collective_s


def _stage_bandwidth(case: Case) -> float:
    link = case.gpu.link if case.layout.world_size <= case.gpu.per_server else case.gpu.network
    return link * case.assumptions.links


def embedding_bytes(case: Case, rank: int) -> float:
    """Bytes that a pipeline rank sends per step to add up the gradients of a tied embedding and its copy."""
    model, pipeline = case.config.model, case.layout.pipeline
    language = model.language
    if not (language.tie_word_embeddings and model.trainable.language and pipeline > 1 and rank in (0, pipeline - 1)):
        return 0.0
    return case.gradient * language.padded_vocab_size // case.layout.tensor * language.hidden_size


def embedding_seconds(case: Case, rank: int) -> float:
    """Time to add up the gradients of a tied embedding and its copy, after those of the replicas."""
    sent = embedding_bytes(case, rank)
    return sent / _stage_bandwidth(case) + case.assumptions.collective_s if sent else 0.0


def data_bytes(case: Case, trained: float) -> tuple[float, float]:
    """Return bytes sent per step (reducing gradients, gathering weights) by a rank with `trained` trained weights."""
    share, sharded = ring_fraction(case.replicas), case.config.parallel.distributed_optimizer
    return trained * case.gradient * share * (1 if sharded else 2), trained * case.settings.element * share * sharded


def data_bandwidth(case: Case) -> float:
    """Bandwidth of one rank in its DP group, bytes/s.

    A ring uses as many network ports of a server as the group has ranks there.
    """
    per_server = max(1, case.gpu.per_server // case.layout.tensor)
    if case.replicas <= per_server:
        return case.gpu.link
    return min(case.gpu.link, case.gpu.network * per_server)


def update_seconds(case: Case, trained: float) -> float:
    """Time of clearing gradients, their norm, and AdamW, which reads gradient, fp32 weight and two moments, and
    writes all but the gradient.
    """
    mine = trained / (case.replicas if case.config.parallel.distributed_optimizer else 1)
    moved = case.gradient * trained + mine * (2 * case.gradient + 8 + 2 * case.moments + case.settings.element)
    brought = (
        mine * case.moments / case.assumptions.host if case.config.optim.offload else 0.0
    )  # and taken back at the same time
    return max(moved / _bandwidth(case), brought)


def trained_weights(case: Case, rank: int) -> int:
    """Number of trained weights on a pipeline rank."""
    return sum(_trained(case, case.chunk(stage)) for stage in case.stages(rank))


def traffic(case: Case) -> Traffic:
    """Bytes sent per step by parallel axis, on the pipeline rank that sends most."""
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
    message, last = message_bytes(case) * case.micro_batches, len(case.counts) - 1
    between = max(
        sum((stage < last) + (stage > 0) for stage in case.stages(rank)) * message + embedding_bytes(case, rank)
        for rank in ranks
    )
    return Traffic(
        tensor=tensor * case.micro_batches,
        context=context * case.micro_batches,
        pipeline=between,
        data=max(sum(data_bytes(case, trained_weights(case, rank))) for rank in ranks),
    )

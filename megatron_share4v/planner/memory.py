"""Bytes that one rank holds, by class, from shapes alone: weights, gradients, optimizer, activations, logits, workspace.

b sequences of S positions in a micro-batch (n = b S), N images of P patches; H, V widths of the language model and the tower; T tensor ranks. The
activations are what autograd keeps of our layers, tensor by tensor (tests compare them with the real thing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import Recompute
from megatron_share4v.model.flops import WorkloadCounts, layer_weights, trained_blocks

FP32, INT64, INT32 = 4, 8, 4
ALIGNMENT = 64  # elements: where megatron-core begins each weight in a sharded gradient buffer


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    """Kept for the backward pass, by all micro-batches in flight."""
    logits: float = 0.0
    """A block of them at a time, and their gradients, in the fused head; all of them without it."""
    workspace: float = 0.0
    """The largest gradients that live for a moment only."""

    @property
    def total(self) -> float:
        """All classes."""
        return sum(astuple(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))


@dataclass(frozen=True)
class Chunk:
    """One pipeline stage: its decoder layers, and whether it holds the tower, projector and embedding, or the head."""

    layers: int
    first: bool
    last: bool
    fp8: range = range(0)
    """Those of its layers that are in FP8, counted from 0 in the chunk."""


def chunk_of(stage: int, counts: Sequence[int], *, fp8: range = range(0)) -> Chunk:
    """What a stage holds of a model with so many layers on each; `fp8`: layers in FP8, counted over the whole model."""
    before, layers = sum(counts[:stage]), counts[stage]
    own = range(min(max(fp8.start - before, 0), layers), max(min(fp8.stop - before, layers), 0))
    return Chunk(layers=layers, first=stage == 0, last=stage == len(counts) - 1, fp8=own)


@dataclass(frozen=True, kw_only=True)
class Fp8Kept:
    """How FP8 layers keep what goes into their matrices. Ours as measured; Transformer Engine's as its 2.20 reads, not measured."""

    engine: bool = False
    """Transformer Engine's: under sequence parallelism it keeps this rank's rows and gathers them again, where ours keeps the gathered ones; and it
    keeps two 8-bit forms of each weight over the step (WEIGHT_CODES)."""
    code: float = 1.0
    """Bytes of one value: its code, and its share of a block's scale."""
    precise: bool = False
    """Weight gradients from the values as they are, which are kept instead."""
    tower: bool = False
    """The tower's trained blocks too."""


WEIGHT_CODES = 2.0
"""Bytes per weight, in Transformer Engine's FP8 layers: cast once per step, as it is and transposed, since Hopper multiplies FP8 in one layout alone."""


@dataclass(frozen=True)
class Recomputed:
    """What is computed again instead of kept, as TrainConfig says it."""

    language: Recompute = "none"
    layers: int | None = None
    tower: Recompute = "none"
    modules: tuple[str, ...] = ()

    def drops(self, what: Recompute, module: str) -> bool:
        """Where `what` (of the tower or the language model) is selective."""
        return what == "selective" and module in self.modules


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How a rank holds things."""

    tensor: int
    context: int = 1
    sequence: bool
    element: int
    """Bytes of a weight or an activation: 2 in bf16, 4 in fp32."""
    native: bool = True
    """The fused ops of csrc/; else their references, which keep more."""
    recompute: Recomputed = Recomputed()
    fp8: Fp8Kept = field(default_factory=Fp8Kept)
    """Where there are FP8 layers."""

    def head_copies(self, model: ModelConfig) -> int:
        """How often context parallelism sends each key/value head (mcore/ulysses.py)."""
        return max(1, self.context // max(1, model.language.num_key_value_heads // self.tensor))


def tensors(model: ModelConfig, chunk: Chunk, *, tensor: int) -> Iterator[tuple[int, int, bool]]:
    """(elements on one rank, how many of these, whether they train) of every weight of a chunk."""
    language, trains = model.language, model.trainable
    width, head = language.hidden_size, language.hidden_size // language.num_attention_heads
    if chunk.first:
        yield from _tower(model, tensor)
        yield from _projector(model, tensor)
        yield language.padded_vocab_size // tensor * width, 1, trains.language
    grouped = width + 2 * language.num_key_value_heads * head
    matrices = (
        grouped * width,
        width * width,
        2 * language.intermediate_size * width,
        language.intermediate_size * width,
    )
    for elements in matrices:
        yield elements // tensor, chunk.layers, trains.language
    yield width, 2 * chunk.layers + chunk.last, trains.language
    if chunk.last:
        yield language.padded_vocab_size // tensor * width, 1, trains.language


def _tower(model: ModelConfig, tensor: int) -> Iterator[tuple[int, int, bool]]:
    vision = model.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    for elements, count in ((3 * width * vision.patch_size**2, 1), (width, 3), ((vision.num_patches + 1) * width, 1)):
        yield elements, count, model.trainable.vision_from_block == -1
    trained = trained_blocks(model)
    for count, trains in ((trained, True), (vision.num_built_layers - trained, False)):
        for elements in (3 * width * width, 3 * width, width * width, inner * width, inner, width * inner):
            yield elements // tensor, count, trains
        yield width, 6 * count, trains


def _projector(model: ModelConfig, tensor: int) -> Iterator[tuple[int, int, bool]]:
    width, trains = model.language.hidden_size, model.trainable.projector
    yield model.vision.hidden_size * width // tensor, 1, trains
    yield width // tensor, 1, trains
    if model.projector.type == "mlp2x_gelu":
        yield width * width // tensor, 1, trains
        yield width, 1, trains


def held(
    model: ModelConfig,
    chunks: list[Chunk],
    kept: Kept,
    *,
    data: int,
    sharded: bool,
    gradient: int = FP32,
    moments: int = 2 * FP32,
) -> Memory:
    """Weights, gradients and optimizer state of a rank with these chunks. `sharded`: the distributed optimizer over `data` ranks.

    gradient, moments: bytes per trained weight.
    """
    weights = buffer = trained = 0
    for chunk in chunks:
        mine = 0
        for elements, count, trains in tensors(model, chunk, tensor=kept.tensor):
            place = math.ceil(elements / ALIGNMENT) * ALIGNMENT if sharded and trains else elements
            weights += count * place
            mine += count * place * trains
            trained += count * elements * trains
        buffer += math.ceil(mine / math.lcm(data, 128)) * math.lcm(data, 128) if sharded else mine
    codes = (
        WEIGHT_CODES * kept.fp8.engine * sum(len(chunk.fp8) for chunk in chunks) * layer_weights(model) / kept.tensor
    )
    state = moments + (FP32 if kept.element < FP32 else 0)  # and the fp32 weights that are updated
    return Memory(
        weights=weights * kept.element + codes,
        gradients=buffer * gradient,
        optimizer=trained * state / (data if sharded else 1),
    )


def activations(model: ModelConfig, chunk: Chunk, amounts: WorkloadCounts, kept: Kept, *, sequences: int) -> float:
    """Bytes that one micro-batch of `amounts` (padding included) keeps of a chunk from its forward pass to its backward pass."""
    e, n = kept.element, amounts.positions
    rows = n / (kept.tensor if kept.sequence else 1)
    width = model.language.hidden_size
    again = min(chunk.layers, kept.recompute.layers or chunk.layers) if kept.recompute.language == "full" else 0
    codes = sum(number >= again for number in chunk.fp8)
    total = again * e * rows * width + codes * _layer(model, kept, n, rows, fp8=kept.fp8)
    total += (chunk.layers - again - codes) * _layer(model, kept, n, rows)
    if chunk.layers > again:
        # The table of rotary positions, of one sequence's length, whoever holds it.
        total += FP32 * kept.context * n / sequences * width / model.language.num_attention_heads
    if chunk.first:
        total += (
            INT64 * n
            + amounts.images * (_tower_activations(model, kept) + _projector_activations(model, kept))
            + INT32 * n * kept.native
        )
    if chunk.last:
        total += _norm(kept, rows * width, rows, output=False)
        total += amounts.head_rows * (e * width + 2 * INT64)
    else:
        total += e * rows * width  # what was sent on
    return total


def _norm(kept: Kept, values: float, rows: float, *, output: bool, statistics: int = 1) -> float:
    """Its input and statistics, and the output where a matrix that trains takes it."""
    return kept.element * values * (1 + output) + FP32 * statistics * rows


def _layer(model: ModelConfig, kept: Kept, n: float, rows: float, *, fp8: Fp8Kept | None = None) -> float:
    language, e, split, trains = model.language, kept.element, kept.tensor, model.trainable.language
    width, inner = language.hidden_size, language.intermediate_size
    grouped = language.num_key_value_heads * width // language.num_attention_heads
    grouped *= kept.head_copies(model)
    no_attention, no_mlp = (kept.recompute.drops(kept.recompute.language, module) for module in ("core_attn", "mlp"))

    def taken(on_rank: float, columns: float) -> float:
        """What a matrix keeps of its input, of so many rows on this rank and n once they are gathered, for its weight's gradient."""
        return trains * columns * (e * on_rank if fp8 is None else _codes(kept, fp8, on_rank, n))

    total = 2 * _norm(kept, rows * width, rows, output=False) + taken(rows, width)
    # The projection, of which the values are a view, and the result, which the kernel keeps, or the next matrix in its place.
    total += e * n * (width + 2 * grouped) / split + e * n * width / split * (
        fp8 is None or fp8.precise or not no_attention
    )
    if fp8 is not None and not fp8.precise:
        total += taken(n, width / split)
    if not no_attention:  # keys and queries, turned, and the kernel's sums
        total += e * n * (width + grouped) / split + FP32 * n * language.num_attention_heads / split
        total += (
            e * n * width / split * (kept.context > 1) * (fp8 is None or fp8.precise)
        )  # the result once more, before it is exchanged
    elif (
        grouped < width and language.num_key_value_heads > split
    ):  # queries of several groups are no view of the projection
        total += e * n * width / split
    if no_mlp:
        return total + e * rows * width * trains
    total += taken(rows, width) + taken(n, inner / split)
    return total + n / split * (e * 2 * inner if kept.native else FP32 * 3 * inner)


def _codes(kept: Kept, fp8: Fp8Kept, rows: float, gathered: float) -> float:
    """Bytes of a column of an input in FP8: `rows` on this rank, `gathered` once they have come together for the product. Our codes lie transposed, their
    rows filled up to a multiple of 16."""
    if fp8.precise:
        return kept.element * (rows if fp8.engine else gathered)
    return fp8.code * (rows if fp8.engine else math.ceil(gathered / 16) * 16)


def _tower_activations(model: ModelConfig, kept: Kept) -> float:
    """For one image: what the blocks that train keep, which is the tower's output too."""
    vision, e, split = model.vision, kept.element, kept.tensor
    width, inner, t = vision.hidden_size, vision.intermediate_size, vision.num_patches + 1
    stem = 0.0
    if model.trainable.vision_from_block == -1:
        stem = e * vision.num_patches * 3 * vision.patch_size**2 + _norm(kept, t * width, t, output=False, statistics=2)
    if kept.recompute.tower == "full":
        return stem + trained_blocks(model) * e * t * width
    no_attention, no_mlp = (kept.recompute.drops(kept.recompute.tower, module) for module in ("core_attn", "mlp"))
    in_fp8 = kept.fp8.tower and not kept.fp8.precise
    each = kept.fp8.code if in_fp8 else e  # of what goes into a matrix
    block = (
        2 * _norm(kept, t * width, t, output=False, statistics=2)
        + each * t * width
        + (e if no_mlp else each) * t * width
    )
    block += e * t * (3 + (not in_fp8 or not no_attention)) * width / split + each * in_fp8 * t * width / split
    if not no_attention:
        block += FP32 * t * vision.num_attention_heads / split
    if not no_mlp:
        block += t * inner / split * (e + each if kept.native else 2 * FP32 + each)
    return stem + trained_blocks(model) * block


def _projector_activations(model: ModelConfig, kept: Kept) -> float:
    """For one image."""
    trainable, e, split, patches = model.trainable, kept.element, kept.tensor, model.vision.num_patches
    width, wanted = (
        model.language.hidden_size,
        model.trainable.projector or model.trainable.vision_from_block is not None,
    )
    total = INT64 * patches * wanted
    if trainable.projector:
        total += e * (patches + 1) * model.vision.hidden_size
    if model.projector.type == "mlp2x_gelu":
        total += patches * width / split * ((e if kept.native else FP32) * wanted + e * trainable.projector)
    return total


def logits(model: ModelConfig, rows: float, kept: Kept) -> float:
    """Bytes of the head's logits and of what is made of them: a block at a time in ops/linear_cross_entropy.py."""
    columns, width = model.language.padded_vocab_size // kept.tensor, model.language.hidden_size
    if not kept.native:
        return rows * columns * (2 * FP32 + kept.element)
    return rows * min(head_columns(rows, columns), columns) * kept.element + rows * width * FP32


def head_columns(rows: float, columns: int) -> int:
    """Columns of the logits that the fused head makes at a time, as ops/linear_cross_entropy.py chooses them."""
    return max(1024, int(min((1 << 23) // max(rows, 1), columns // 8)) // 64 * 64)


def workspace(model: ModelConfig, chunks: list[Chunk], amounts: WorkloadCounts, kept: Kept) -> float:
    """The larger of: the gradients inside one decoder layer with that of its largest matrix; the gradient of embedding or head."""
    language, e, split = model.language, kept.element, kept.tensor
    width, inner, n = language.hidden_size, language.intermediate_size, amounts.positions
    layer = e * n * (3 * inner / split + 3 * width) + e * 2 * inner * width / split * model.trainable.language
    if kept.recompute.language != "none":
        layer += _layer(model, replace(kept, recompute=Recomputed()), n, n / (split if kept.sequence else 1))
    if any(
        chunk.fp8 for chunk in chunks
    ):  # the codes of the largest matrix, and of its output's gradient as it is and transposed
        layer += 2 * inner * width / split + 2 * n * 2 * inner / split
    ends = any(chunk.first or chunk.last for chunk in chunks) and model.trainable.language
    return max(layer, e * language.padded_vocab_size / split * width + e * n * width if ends else 0.0)

"""Bytes that one rank holds, by class, from shapes alone: weights, gradients, optimizer, activations, logits, workspace.

b sequences of S positions in a micro-batch (n = b S), N images of P patches; H, V widths of the language model and the tower; T tensor ranks. The
activations are what autograd keeps of our layers, tensor by tensor (tests compare them with the real thing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import Recompute
from megatron_share4v.model.flops import Amounts, trained_blocks

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

    def head_copies(self, model: ModelConfig) -> int:
        """How often context parallelism sends each key/value head (mcore/context.py)."""
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
    matrices = (grouped * width, width * width, 2 * language.intermediate_size * width, language.intermediate_size * width)
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


def held(model: ModelConfig, chunks: list[Chunk], kept: Kept, *, data: int, sharded: bool, gradient: int = FP32, moments: int = 2 * FP32) -> Memory:
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
    state = moments + (FP32 if kept.element < FP32 else 0)  # and the fp32 weights that are updated
    return Memory(weights=weights * kept.element, gradients=buffer * gradient, optimizer=trained * state / (data if sharded else 1))


def activations(model: ModelConfig, chunk: Chunk, amounts: Amounts, kept: Kept, *, sequences: int) -> float:
    """Bytes that one micro-batch of `amounts` (padding included) keeps of a chunk from its forward pass to its backward pass."""
    e, n = kept.element, amounts.positions
    rows = n / (kept.tensor if kept.sequence else 1)
    width = model.language.hidden_size
    again = min(chunk.layers, kept.recompute.layers or chunk.layers) if kept.recompute.language == "full" else 0
    total = again * e * rows * width + (chunk.layers - again) * _layer(model, kept, n, rows)
    if chunk.layers > again:
        # The table of rotary positions, of one sequence's length, whoever holds it.
        total += FP32 * kept.context * n / sequences * width / model.language.num_attention_heads
    if chunk.first:
        total += INT64 * n + amounts.images * (_tower_activations(model, kept) + _projector_activations(model, kept)) + INT32 * n * kept.native
    if chunk.last:
        total += _norm(kept, rows * width, rows, output=False)
        total += amounts.head_rows * (e * width + 2 * INT64)
    else:
        total += e * rows * width  # what was sent on
    return total


def _norm(kept: Kept, values: float, rows: float, *, output: bool, statistics: int = 1) -> float:
    """Its input and statistics, and the output where a matrix that trains takes it."""
    return kept.element * values * (1 + output) + FP32 * statistics * rows


def _layer(model: ModelConfig, kept: Kept, n: float, rows: float) -> float:
    language, e, split, trains = model.language, kept.element, kept.tensor, model.trainable.language
    width, inner = language.hidden_size, language.intermediate_size
    drops = kept.recompute.drops
    grouped = language.num_key_value_heads * width // language.num_attention_heads
    grouped *= kept.head_copies(model)
    total = 2 * _norm(kept, rows * width, rows, output=trains)
    # The projection, of which the values are a view, and the result.
    total += e * n * (2 * width + 2 * grouped) / split
    if not drops(kept.recompute.language, "core_attn"):  # keys and queries, turned, and the kernel's sums
        total += e * n * (width + grouped) / split + FP32 * n * language.num_attention_heads / split
        total += e * n * width / split * (kept.context > 1)  # the result once more, before it is exchanged
    elif grouped < width and language.num_key_value_heads > split:  # queries of several groups are no view of the projection
        total += e * n * width / split
    if not drops(kept.recompute.language, "mlp"):
        between = e * 2 * inner if kept.native else FP32 * 3 * inner
        total += n / split * (between + e * inner * trains)
    return total


def _tower_activations(model: ModelConfig, kept: Kept) -> float:
    """For one image: what the blocks that train keep, which is the tower's output too."""
    vision, e, split = model.vision, kept.element, kept.tensor
    width, inner, t = vision.hidden_size, vision.intermediate_size, vision.num_patches + 1
    stem = 0.0
    if model.trainable.vision_from_block == -1:
        stem = e * vision.num_patches * 3 * vision.patch_size**2 + _norm(kept, t * width, t, output=False, statistics=2)
    if kept.recompute.tower == "full":
        return stem + trained_blocks(model) * e * t * width
    block = 2 * _norm(kept, t * width, t, output=True, statistics=2) + e * t * 4 * width / split
    if not kept.recompute.drops(kept.recompute.tower, "core_attn"):
        block += FP32 * t * vision.num_attention_heads / split
    if not kept.recompute.drops(kept.recompute.tower, "mlp"):
        block += t * inner / split * (2 * e if kept.native else 2 * FP32 + e)
    return stem + trained_blocks(model) * block


def _projector_activations(model: ModelConfig, kept: Kept) -> float:
    """For one image."""
    trainable, e, split, patches = model.trainable, kept.element, kept.tensor, model.vision.num_patches
    width, wanted = model.language.hidden_size, model.trainable.projector or model.trainable.vision_from_block is not None
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


def workspace(model: ModelConfig, chunks: list[Chunk], amounts: Amounts, kept: Kept) -> float:
    """The larger of: the gradients inside one decoder layer with that of its largest matrix; the gradient of embedding or head."""
    language, e, split = model.language, kept.element, kept.tensor
    width, inner, n = language.hidden_size, language.intermediate_size, amounts.positions
    layer = e * n * (3 * inner / split + 3 * width) + e * 2 * inner * width / split * model.trainable.language
    if kept.recompute.language != "none":
        layer += _layer(model, replace(kept, recompute=Recomputed()), n, n / (split if kept.sequence else 1))
    ends = any(chunk.first or chunk.last for chunk in chunks) and model.trainable.language
    return max(layer, e * language.padded_vocab_size / split * width + e * n * width if ends else 0.0)

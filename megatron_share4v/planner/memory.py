"""Bytes that one rank holds, by class, from shapes alone: weights, gradients, optimizer, activations, logits,
workspace.

b sequences of S positions in a micro-batch (n = b S), N images of P patches; H, V widths of the language model and the
tower; T tensor ranks. The activations are what autograd keeps of our layers, tensor by tensor (tests compare them with
the real thing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.training import Recompute
from megatron_share4v.model.flops import WorkloadCounts, layer_weights, trained_blocks

FP32, INT64, INT32 = 4, 8, 4
ALIGNMENT = 64  # elements: where megatron-core begins each weight in a sharded gradient buffer


@dataclass(frozen=True)
class Memory:
    """Peak memory of one rank by class, bytes."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    """Activations saved for the backward pass by all micro-batches in flight."""
    logits: float = 0.0
    """Logits and their gradients, one block of the vocabulary at a time."""
    workspace: float = 0.0
    """Largest set of short-lived gradients."""

    @property
    def total(self) -> float:
        """Sum of all classes."""
        return sum(astuple(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(one + added for one, added in zip(astuple(self), astuple(other))))


@dataclass(frozen=True)
class Chunk:
    """One pipeline stage: its decoder layers, and whether it holds the tower, projector and embedding, or the head."""

    layers: int
    first: bool
    last: bool
    fp8: range = range(0)
    """FP8 layers, counted from 0 in the chunk."""


def make_chunk(stage: int, counts: Sequence[int], *, fp8: range = range(0)) -> Chunk:
    """Describe a stage of a model with `counts` layers per stage. fp8: FP8 layers, counted over the whole model."""
    before, layers = sum(counts[:stage]), counts[stage]
    own = range(min(max(fp8.start - before, 0), layers), max(min(fp8.stop - before, layers), 0))
    return Chunk(layers=layers, first=stage == 0, last=stage == len(counts) - 1, fp8=own)


@dataclass(frozen=True, kw_only=True)
class Fp8Settings:
    """How FP8 layers save the inputs of their products: measured for our layers, read from the source of Transformer
    Engine 2.20 for its layers.
    """

    engine: bool = False
    """Transformer Engine layers.

    With sequence parallelism they save the local rows and gather them again (ours save the gathered rows), and they
    keep two 8-bit forms of each weight over the step (WEIGHT_CODES).
    """
    code: float = 1.0
    """Bytes per value: its 8-bit code and its part of a block scale."""
    precise: bool = False
    """Compute weight gradients in the compute type, whose values are saved instead of codes."""
    tower: bool = False
    """FP8 in the trained blocks of the vision tower too."""


WEIGHT_CODES = 2.0
"""Bytes per weight of Transformer Engine's FP8 copies, cast once per step plain and transposed: Hopper multiplies
FP8 in one layout only.
"""


@dataclass(frozen=True)
class RecomputeSettings:
    """Activation recomputation as set in TrainConfig."""

    language: Recompute = "none"
    layers: int | None = None
    tower: Recompute = "none"
    modules: tuple[str, ...] = ()

    def drops(self, what: Recompute, module: str) -> bool:
        """True when recomputation `what` is selective and includes `module`."""
        return what == "selective" and module in self.modules


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Settings that determine the memory of a rank."""

    tensor: int
    context: int = 1
    sequence: bool
    element: int
    """Bytes of a weight or an activation: 2 in bf16, 4 in fp32."""
    native: bool = True
    """Fused ops of csrc/; their references save more."""
    recompute: RecomputeSettings = RecomputeSettings()
    fp8: Fp8Settings = field(default_factory=Fp8Settings)
    """Settings of FP8 layers, used when there are any."""

    def head_copies(self, model: ModelConfig) -> int:
        """Copies of each key/value head that context parallelism sends (mcore/ulysses.py)."""
        return max(1, self.context // max(1, model.language.num_key_value_heads // self.tensor))


def weight_shapes(model: ModelConfig, chunk: Chunk, *, tensor: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (elements on one rank, number of such tensors, trained) for every weight of a chunk."""
    language, trains = model.language, model.trainable
    width, head = language.hidden_size, language.attention_head_dim
    if chunk.first:
        yield from _tower(model, tensor)
        yield from _projector(model, tensor)
        yield language.padded_vocab_size // tensor * width, 1, trains.language
    projected = language.query_width + 2 * language.key_width
    matrices = (
        projected * width,
        language.query_width * width,
        2 * language.intermediate_size * width,
        language.intermediate_size * width,
        projected * language.qkv_bias,
    )
    for elements in matrices:
        yield elements // tensor, chunk.layers, trains.language
    yield width, (2 + language.out_bias) * chunk.layers + chunk.last, trains.language
    yield head, 2 * language.qk_norm * chunk.layers, trains.language
    if chunk.last and not (chunk.first and language.tie_word_embeddings):  # its own weight, or a copy of the embedding
        yield language.padded_vocab_size // tensor * width, 1, trains.language


def _tower(model: ModelConfig, tensor: int) -> Iterator[tuple[int, int, bool]]:
    vision = model.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    vectors = vision.class_token + vision.patch_bias + 2 * vision.pre_norm
    for elements, count in ((3 * width * vision.patch_size**2, 1), (width, vectors), (vision.num_positions * width, 1)):
        yield elements, count, model.trainable.vision_from_block == -1
    trained = trained_blocks(model)
    for count, trains in ((trained, True), (vision.num_built_layers - trained, False)):
        for elements in (3 * width * width, 3 * width, width * width, inner * width, inner, width * inner):
            yield elements // tensor, count, trains
        yield width, (6 + 2 * vision.layer_scale) * count, trains


def _projector(model: ModelConfig, tensor: int) -> Iterator[tuple[int, int, bool]]:
    width, trains = model.language.hidden_size, model.trainable.projector
    for number in range(model.projector.depth):
        yield (width if number else model.vision.feature_width) * width // tensor, 1, trains
        yield width // (1 if number % 2 else tensor), 1, trains


def model_state_memory(
    model: ModelConfig,
    chunks: list[Chunk],
    settings: MemorySettings,
    *,
    data: int,
    sharded: bool,
    gradient: int = FP32,
    moments: int = 2 * FP32,
) -> Memory:
    """Memory of weights, gradients and optimizer state of a rank. sharded: distributed optimizer over `data` ranks.

    gradient, moments: bytes per trained weight.
    """
    weights = buffer = trained = 0
    for chunk in chunks:
        one = 0
        for elements, count, trains in weight_shapes(model, chunk, tensor=settings.tensor):
            place = math.ceil(elements / ALIGNMENT) * ALIGNMENT if sharded and trains else elements
            weights += count * place
            one += count * place * trains
            trained += count * elements * trains
        buffer += math.ceil(one / math.lcm(data, 128)) * math.lcm(data, 128) if sharded else one
    codes = (
        WEIGHT_CODES
        * settings.fp8.engine
        * sum(len(chunk.fp8) for chunk in chunks)
        * layer_weights(model)
        / settings.tensor
    )
    state = moments + (FP32 if settings.element < FP32 else 0)  # and the fp32 weights that are updated
    return Memory(
        weights=weights * settings.element + codes,
        gradients=buffer * gradient,
        optimizer=trained * state / (data if sharded else 1),
    )


def activations(
    model: ModelConfig, chunk: Chunk, amounts: WorkloadCounts, settings: MemorySettings, *, sequences: int
) -> float:
    """Bytes that one micro-batch of `amounts` (padding included) saves in a chunk for its backward pass."""
    e, n = settings.element, amounts.positions
    rows = n / (settings.tensor if settings.sequence else 1)
    width = model.language.hidden_size
    again = min(chunk.layers, settings.recompute.layers or chunk.layers) if settings.recompute.language == "full" else 0
    codes = sum(number >= again for number in chunk.fp8)
    total = again * e * rows * width + codes * _layer(model, settings, n, rows, fp8=settings.fp8)
    total += (chunk.layers - again - codes) * _layer(model, settings, n, rows)
    if chunk.layers > again:
        # The table of rotary positions, of one sequence's length, whoever holds it.
        total += FP32 * settings.context * n / sequences * model.language.attention_head_dim
    if chunk.first:
        total += (
            INT64 * n
            + amounts.images * (_tower_activations(model, settings) + _projector_activations(model, settings))
            + INT32 * n * settings.native
        )
    if chunk.last:
        total += _norm(settings, rows * width, rows, output=False)
        total += amounts.head_rows * (e * width + 2 * INT64)
    else:
        total += e * rows * width  # what was sent on
    return total


def _norm(settings: MemorySettings, values: float, rows: float, *, output: bool, statistics: int = 1) -> float:
    """Bytes saved by a norm: input and statistics, and the output when a trained matrix takes it."""
    return settings.element * values * (1 + output) + FP32 * statistics * rows


def _layer(
    model: ModelConfig, settings: MemorySettings, n: float, rows: float, *, fp8: Fp8Settings | None = None
) -> float:
    language, e, split, trains = model.language, settings.element, settings.tensor, model.trainable.language
    width, inner = language.hidden_size, language.intermediate_size
    queries, keys = language.query_width, language.key_width * settings.head_copies(model)
    no_attention, no_mlp = (
        settings.recompute.drops(settings.recompute.language, module) for module in ("core_attn", "mlp")
    )

    def taken(on_rank: float, columns: float) -> float:
        """Bytes of a matrix's input saved for the weight gradient: `on_rank` rows here, n rows after the gather."""
        return trains * columns * (e * on_rank if fp8 is None else _codes(settings, fp8, on_rank, n))

    total = 2 * _norm(settings, rows * width, rows, output=False) + taken(rows, width)
    # The projection, of which the values are a view, and the result, which the kernel keeps, or the next matrix in its
    # place.
    total += e * n * (queries + 2 * keys) / split + e * n * queries / split * (
        fp8 is None or fp8.precise or not no_attention
    )
    if fp8 is not None and not fp8.precise:
        total += taken(n, queries / split)
    # Queries of several groups are no view of the projection.
    copied = e * n * queries / split * (keys < queries and language.num_key_value_heads > split)
    if language.qk_norm:  # its input, sums, and output where that is not rotated at once
        heads = language.num_attention_heads + language.num_key_value_heads
        total += copied + FP32 * n * heads / split + e * n * (queries + keys) / split * no_attention
        if settings.context > 1 and not no_attention:  # the projection beside what is exchanged for it
            total += e * n * (queries + 2 * language.key_width) / split
    if not no_attention:  # keys and queries, turned, and the kernel's sums
        total += e * n * (queries + keys) / split + FP32 * n * language.num_attention_heads / split
        total += (
            e * n * queries / split * (settings.context > 1) * (fp8 is None or fp8.precise)
        )  # the result once more, before it is exchanged
    elif not language.qk_norm:
        total += copied
    if no_mlp:
        return total + e * rows * width * trains
    total += taken(rows, width) + taken(n, inner / split)
    return total + n / split * (e * 2 * inner if settings.native else FP32 * 3 * inner)


def _codes(settings: MemorySettings, fp8: Fp8Settings, rows: float, gathered: float) -> float:
    """Bytes of one column of an FP8 input: `rows` local rows, `gathered` rows after the gather.

    Our codes are stored transposed, with rows padded to a multiple of 16.
    """
    if fp8.precise:
        return settings.element * (rows if fp8.engine else gathered)
    return fp8.code * (rows if fp8.engine else math.ceil(gathered / 16) * 16)


def _tower_activations(model: ModelConfig, settings: MemorySettings) -> float:
    """Bytes per image that trained vision blocks save, the output of the tower included."""
    vision, e, split = model.vision, settings.element, settings.tensor
    width, inner, t = vision.hidden_size, vision.intermediate_size, vision.num_positions
    stem = 0.0
    if model.trainable.vision_from_block == -1:
        stem = e * vision.num_patches * 3 * vision.patch_size**2
        stem += vision.pre_norm * _norm(settings, t * width, t, output=False, statistics=2)
    if settings.recompute.tower == "full":
        return stem + trained_blocks(model) * e * t * width
    no_attention, no_mlp = (
        settings.recompute.drops(settings.recompute.tower, module) for module in ("core_attn", "mlp")
    )
    in_fp8 = settings.fp8.tower and not settings.fp8.precise
    each = settings.fp8.code if in_fp8 else e  # of what goes into a matrix
    block = (
        2 * _norm(settings, t * width, t, output=False, statistics=2)
        + each * t * width
        + (e if no_mlp else each) * t * width
    )
    block += e * t * (3 + (not in_fp8 or not no_attention)) * width / split + each * in_fp8 * t * width / split
    if not no_attention:
        block += FP32 * t * vision.num_attention_heads / split
    if not no_mlp:  # the reference of quick GELU saves its sigmoid too
        saved = e if settings.native else FP32 * (2 if vision.activation == "quick_gelu" else 1)
        block += t * inner / split * (saved + each)
    if vision.layer_scale:  # what is scaled
        block += e * t * width * (1 + (not no_mlp))
    return stem + trained_blocks(model) * block


def _projector_activations(model: ModelConfig, settings: MemorySettings) -> float:
    """Bytes per image that the projector saves."""
    trainable, e, vision = model.trainable, settings.element, model.vision
    wanted = trainable.projector or trainable.vision_from_block is not None
    total = float(INT64 * vision.num_features * wanted)
    if trainable.projector:
        total += e * vision.num_positions * vision.feature_width
    for number in range(model.projector.depth - 1):  # an activation's input, and its output where a matrix trains
        width = model.language.hidden_size / (1 if number % 2 else settings.tensor)
        saved = (e if settings.native else FP32) * wanted + e * trainable.projector
        total += vision.num_features * width * saved
    return total


def logits(model: ModelConfig, rows: float, settings: MemorySettings) -> float:
    """Bytes of the logits and their gradients: one block at a time in ops/linear_cross_entropy.py."""
    columns, width = model.language.padded_vocab_size // settings.tensor, model.language.hidden_size
    block = rows * min(head_columns(rows, columns, native=settings.native), columns)
    return block * (settings.element + (not settings.native) * FP32) + rows * width * FP32


def head_columns(rows: float, columns: int, *, native: bool = True) -> int:
    """Columns of logits in one block of the head, as chosen in ops/linear_cross_entropy.py."""
    return max(1024, int(min((1 << 23) // max(rows, 1), columns // (12 if native else 32))) // 64 * 64)


def workspace(model: ModelConfig, chunks: list[Chunk], amounts: WorkloadCounts, settings: MemorySettings) -> float:
    """Bytes of the larger of: gradients inside one decoder layer with that of its largest matrix; the gradient of
    embedding or head.
    """
    language, e, split = model.language, settings.element, settings.tensor
    width, inner, n = language.hidden_size, language.intermediate_size, amounts.positions
    layer = e * n * (3 * inner / split + 3 * width) + e * 2 * inner * width / split * model.trainable.language
    if settings.recompute.language != "none":
        layer += _layer(
            model, replace(settings, recompute=RecomputeSettings()), n, n / (split if settings.sequence else 1)
        )
    if any(
        chunk.fp8 for chunk in chunks
    ):  # the codes of the largest matrix, and of its output's gradient as it is and transposed
        layer += 2 * inner * width / split + 2 * n * 2 * inner / split
    ends = any(chunk.first or chunk.last for chunk in chunks) and model.trainable.language
    return max(layer, e * language.padded_vocab_size / split * width + e * n * width if ends else 0.0)

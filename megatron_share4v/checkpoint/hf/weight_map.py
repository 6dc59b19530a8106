"""The weight map: which Hugging Face tensors make which global Megatron tensor, and which are ignored.

Import, export and verification use it; it knows no files, ranks or checkpoints. Megatron names and shapes are those of
`model.initialize.shards`: global, whatever the parallel layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from megatron_share4v.checkpoint.hf.families import TOWER_FAMILIES, TowerNames
from megatron_share4v.checkpoint.hf.transforms import (
    ConcatRows,
    Identity,
    InterleaveQKV,
    PadVocabulary,
    SqueezeLeading,
    Transform,
)
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.errors import ConversionError

Component = Literal["vision", "projector", "language"]
COMPONENTS: tuple[Component, ...] = ("vision", "projector", "language")
# A model of another size differs in hundreds of tensors; the first ones show why.
_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Tensor name prefixes of the model components in one layout; None for a component that it does not have."""

    title: str
    tower: str | None = None
    """Prefix of the tower; of a layout, with CLIP's inner `vision_model.`, which other families can lack."""
    in_memory: bool = False
    """Whether the tower has the names of transformers 5's classes where they differ from those of files (DINOv2)."""
    projector_mlp: tuple[str, ...] | None = None
    """Prefixes of the linear layers of mlpNx_gelu: of two, which is the only depth then, or of as many as can be."""
    projector_linear: str | None = None
    decoder: str | None = None
    """Prefix of `embed_tokens.`, `layers.` and `norm.`"""
    head: str | None = None

    def tower_prefix(self, vision: VisionConfig) -> str:
        """Return the prefix of the tower of `vision` in this layout."""
        prefix = self.tower or ""
        inner = TOWER_FAMILIES[vision.model_type].inner
        return prefix if inner else prefix.removesuffix("vision_model.")

    def tower_names(self, vision: VisionConfig) -> TowerNames:
        """Return the names of the tower's tensors after the prefix."""
        family = TOWER_FAMILIES[vision.model_type]
        return (family.names_in_memory if self.in_memory else None) or family.names

    def projector_layers(self, depth: int) -> tuple[str, ...] | None:
        """Return the prefixes of the linear layers of mlpNx_gelu with N = `depth`; None without such a projector."""
        layers = self.projector_mlp or ()
        return layers[:depth] if len(layers) == depth or len(layers) > max(2, depth) else None


MAX_PROJECTOR_DEPTH = 9
"""Largest N of mlpNx_gelu in the configuration."""


def sequential_layers(prefix: str) -> tuple[str, ...]:
    """Return the prefixes of the linear layers of LLaVA's projector `prefix`: every other layer is an activation."""
    return tuple(f"{prefix}{2 * number}." for number in range(MAX_PROJECTOR_DEPTH))


LLAVA_HF = Naming(
    title="llava-hf",
    tower="vision_tower.vision_model.",
    projector_mlp=("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    decoder="language_model.model.",
    head="language_model.lm_head.",
)
"""Hub files of transformers' LlavaForConditionalGeneration, also read by vLLM and SGLang."""

LLAVA_IN_MEMORY = Naming(
    title="transformers 5 LlavaForConditionalGeneration",
    tower="model.vision_tower.",
    in_memory=True,
    projector_mlp=("model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    decoder="model.language_model.",
    head="lm_head.",
)
"""`state_dict()` of the same class in transformers 5."""

SHARE4V = Naming(
    title="share4v",
    tower="model.vision_tower.vision_tower.vision_model.",
    projector_mlp=sequential_layers("model.mm_projector."),
    projector_linear="model.mm_projector.",
    decoder="model.",
    head="lm_head.",
)
"""Official ShareGPT4V and LLaVA; also a bare LlamaForCausalLM, with components=("language",)."""

CLIP = Naming(title="CLIPVisionModel", tower="vision_model.")
"""A vision tower of any family beside its language model, as ShareGPT4V publishes CLIP's."""

CLIP_IN_MEMORY = Naming(title="transformers 5 CLIPVisionModel", tower="", in_memory=True)
"""`state_dict()` of a vision tower's class in transformers 5."""

_BARE_TOWER = Naming(title="tower without prefix", tower="")


@dataclass(frozen=True)
class WeightMapping:
    """One global Megatron tensor, its shape, and the Hugging Face tensors that it is built from."""

    name: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    transform: Transform

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the Hugging Face tensors, by running the inverse transform on the meta device."""
        parts = self.transform.to_hf(torch.empty(self.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.hf_names, parts, strict=True)}


@dataclass(frozen=True)
class IgnoredWeights:
    """Hugging Face tensors without a counterpart, by prefix or, for buffers, by suffix."""

    prefix: str
    suffix: str
    reason: str
    weights: bool = False
    """True for weights, which an export needs; False for buffers that follow from the configuration."""

    def covers(self, name: str) -> bool:
        """Return whether `name` is ignored."""
        return name.startswith(self.prefix) and name.endswith(self.suffix)


def _with_bias(
    megatron: str, width: int, hf: Iterable[str], transform: Transform, *, inputs: tuple[int, ...]
) -> Iterator[WeightMapping]:
    yield WeightMapping(f"{megatron}.weight", (width, *inputs), tuple(f"{name}.weight" for name in hf), transform)
    yield WeightMapping(f"{megatron}.bias", (width,), tuple(f"{name}.bias" for name in hf), transform)


def _vision_rows(model: ModelConfig, naming: Naming) -> Iterator[WeightMapping]:
    vision, same = model.vision, Identity()
    prefix, names = naming.tower_prefix(vision), naming.tower_names(vision)
    width, patch = vision.hidden_size, vision.patch_size
    if vision.class_token:
        transform = SqueezeLeading(2) if names.batched else same
        yield WeightMapping("vision.class_embedding", (width,), (prefix + names.class_token,), transform)
    yield WeightMapping(
        "vision.patch_embedding.weight", (width, 3, patch, patch), (f"{prefix}{names.patch}.weight",), same
    )
    if vision.patch_bias:
        yield WeightMapping("vision.patch_embedding.bias", (width,), (f"{prefix}{names.patch}.bias",), same)
    yield WeightMapping(
        "vision.position_embedding",
        (vision.num_positions, width),
        (prefix + names.position,),
        SqueezeLeading(1) if names.batched else same,
    )
    if vision.pre_norm:
        yield from _with_bias("vision.pre_layernorm", width, [prefix + names.pre_norm], same, inputs=())
    for i in range(vision.num_built_layers):
        yield from _block_rows(vision, f"vision.layers.{i}", f"{prefix}{names.blocks}{i}.", names)


def _block_rows(vision: VisionConfig, megatron: str, hf: str, names: TowerNames) -> Iterator[WeightMapping]:
    width, inner, same = vision.hidden_size, vision.intermediate_size, Identity()
    heads = InterleaveQKV(
        groups=vision.num_attention_heads, queries_per_group=1, head_dim=width // vision.num_attention_heads
    )
    qkv = [hf + part for part in (names.query, names.key, names.value)]
    yield from _with_bias(f"{megatron}.input_layernorm", width, [hf + names.norms[0]], same, inputs=())
    yield from _with_bias(f"{megatron}.self_attention.linear_qkv", 3 * width, qkv, heads, inputs=(width,))
    yield from _with_bias(f"{megatron}.self_attention.linear_proj", width, [hf + names.out], same, inputs=(width,))
    yield from _with_bias(f"{megatron}.pre_mlp_layernorm", width, [hf + names.norms[1]], same, inputs=())
    yield from _with_bias(f"{megatron}.mlp.linear_fc1", inner, [hf + names.mlp[0]], same, inputs=(width,))
    yield from _with_bias(f"{megatron}.mlp.linear_fc2", width, [hf + names.mlp[1]], same, inputs=(inner,))
    if vision.layer_scale:
        for part, name in zip(("self_attention", "mlp"), names.scales):
            yield WeightMapping(f"{megatron}.{part}.layer_scale", (width,), (hf + name,), same)


def _projector_rows(model: ModelConfig, naming: Naming) -> Iterator[WeightMapping]:
    width, depth, kind = model.language.hidden_size, model.projector.depth, model.projector.type
    layers = naming.projector_layers(depth)
    if kind == "linear":
        layers = None if naming.projector_linear is None else (naming.projector_linear,)
    if layers is None:
        raise ConversionError(
            f"the layout {naming.title} has no projector of model.projector.type {kind}; use another layout"
        )
    for number, (name, prefix) in enumerate(zip(_projector_names(depth), layers, strict=True)):
        inputs = width if number else model.vision.feature_width
        yield from _with_bias(f"projector.{name}", width, [prefix.removesuffix(".")], Identity(), inputs=(inputs,))


def _projector_names(depth: int) -> tuple[str, ...]:
    """Return our names of a projector's linear layers."""
    if depth == 1:
        return ("linear",)
    return ("mlp.linear_fc1", "mlp.linear_fc2") if depth == 2 else tuple(f"layers.{i}" for i in range(depth))


def _language_rows(model: ModelConfig, naming: Naming) -> Iterator[WeightMapping]:
    language, same, width = model.language, Identity(), model.language.hidden_size
    vocabulary = PadVocabulary(rows=language.vocab_size, padded=language.padded_vocab_size)
    yield WeightMapping(
        "language.embedding.weight", (vocabulary.padded, width), (f"{naming.decoder}embed_tokens.weight",), vocabulary
    )
    for i in range(language.num_layers):
        yield from _layer_rows(language, f"language.decoder.layers.{i}", f"{naming.decoder}layers.{i}")
    yield WeightMapping("language.decoder.final_layernorm.weight", (width,), (f"{naming.decoder}norm.weight",), same)
    if not language.tie_word_embeddings:
        yield WeightMapping("language.head.weight", (vocabulary.padded, width), (f"{naming.head}weight",), vocabulary)


def _layer_rows(language: LanguageConfig, megatron: str, hf: str) -> Iterator[WeightMapping]:
    width, inner, same = language.hidden_size, language.intermediate_size, Identity()
    groups, head = language.num_key_value_heads, language.attention_head_dim
    heads = InterleaveQKV(groups=groups, queries_per_group=language.num_attention_heads // groups, head_dim=head)
    qkv_rows, out_columns = groups * (heads.queries_per_group + 2) * head, language.num_attention_heads * head
    qkv, out = [f"{hf}.self_attn.{part}_proj" for part in "qkv"], [f"{hf}.self_attn.o_proj"]
    attention = f"{megatron}.self_attention"
    linears = (
        (f"{attention}.linear_qkv", qkv_rows, qkv, heads, width, language.qkv_bias),
        (f"{attention}.linear_proj", width, out, same, out_columns, language.out_bias),
        (f"{megatron}.mlp.linear_fc1", 2 * inner, [f"{hf}.mlp.{p}_proj" for p in ("gate", "up")], ConcatRows(), width,
         False),
        (f"{megatron}.mlp.linear_fc2", width, [f"{hf}.mlp.down_proj"], same, inner, False),
    )  # fmt: skip
    norms = {"linear_qkv": [(f"{megatron}.input_layernorm", width, f"{hf}.input_layernorm")]}
    norms["linear_fc1"] = [(f"{megatron}.pre_mlp_layernorm", width, f"{hf}.post_attention_layernorm")]
    if language.qk_norm:
        norms["linear_proj"] = [(f"{attention}.{part}_layernorm", head, f"{hf}.self_attn.{part}_norm") for part in "qk"]
    # In the order of an export's file: each norm before the matrix that follows it.
    for name, rows, sources, transform, inputs, bias in linears:
        for norm, size, source in norms.get(name.rpartition(".")[2], ()):
            yield WeightMapping(f"{norm}.weight", (size,), (f"{source}.weight",), same)
        whole = tuple(_with_bias(name, rows, sources, transform, inputs=(inputs,)))
        yield from whole if bias else whole[:1]


def weight_mappings(
    model: ModelConfig, *, naming: Naming, components: Iterable[Component] = COMPONENTS
) -> Iterator[WeightMapping]:
    """Yield the mapping of every global tensor of `components`.

    Raises ConversionError when `naming` lacks one of them.
    """
    for component in components:
        if component == "projector":
            yield from _projector_rows(model, naming)
        elif component == "vision" and naming.tower is not None:
            yield from _vision_rows(model, naming)
        elif component == "language" and naming.decoder is not None:
            yield from _language_rows(model, naming)
        else:
            raise ConversionError(f"the layout {naming.title} has no component {component}; use another layout")


def ignored_weights(
    model: ModelConfig, *, naming: Naming, components: Iterable[Component] = COMPONENTS
) -> Iterator[IgnoredWeights]:
    """Yield the Hugging Face tensors that are ignored on purpose, with the reason."""
    for component in components:
        if component == "vision" and naming.tower is not None:
            vision, prefix = model.vision, naming.tower_prefix(model.vision)
            for name in TOWER_FAMILIES[vision.model_type].unused_shapes(vision):
                reason = "has no effect on the features of model.vision.feature_layer"
                yield IgnoredWeights(prefix + name, "", reason, weights=True)
            yield IgnoredWeights(f"{prefix}embeddings.", "position_ids", "a buffer that counts up from zero")
            for i in range(vision.num_built_layers, vision.num_layers):
                reason = "comes after model.vision.feature_layer, so it is never computed"
                blocks = naming.tower_names(vision).blocks
                yield IgnoredWeights(f"{prefix}{blocks}{i}.", "", reason, weights=True)
        if component == "language" and naming.decoder is not None:
            yield IgnoredWeights(
                f"{naming.decoder}layers.",
                "rotary_emb.inv_freq",
                "a buffer that follows from model.language.rope_theta",
            )


def unused_tower_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tower weights that the model does not compute but an export has, by the family's names
    in files without prefix.
    """
    tower = replace(model, vision=replace(model.vision, feature_layer=model.vision.num_layers))
    built = {name for mapping in _vision_rows(model, _BARE_TOWER) for name in mapping.hf_names}
    unused = {
        name: shape
        for mapping in _vision_rows(tower, _BARE_TOWER)
        for name, shape in mapping.hf_shapes().items()
        if name not in built
    }
    return unused | TOWER_FAMILIES[model.vision.model_type].unused_shapes(model.vision)


class HasShape(Protocol):
    """A tensor or tensor description with a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""


def check_hf_weights(
    hf: Mapping[str, HasShape], model: ModelConfig, *, naming: Naming, components: Iterable[Component] = COMPONENTS
) -> tuple[WeightMapping, ...]:
    """Check Hugging Face tensors against the weight map; return the mappings of `components`.

    Raises ConversionError naming missing, unexpected and wrongly shaped tensors.
    """
    components = tuple(components)
    table = tuple(weight_mappings(model, naming=naming, components=components))
    expected = {name: shape for mapping in table for name, shape in mapping.hf_shapes().items()}
    dropped = tuple(ignored_weights(model, naming=naming, components=components))
    extra = [name for name in hf if name not in expected and not any(drop.covers(name) for drop in dropped)]
    _check(hf, expected, extra=extra, where=f"a model of layout {naming.title}")
    return table


def to_megatron(
    hf: Mapping[str, torch.Tensor],
    model: ModelConfig,
    *,
    naming: Naming,
    components: Iterable[Component] = COMPONENTS,
) -> dict[str, torch.Tensor]:
    """Convert Hugging Face tensors to global Megatron tensors. Raises ConversionError as `check_hf_weights` does."""
    table = check_hf_weights(hf, model, naming=naming, components=components)
    return {mapping.name: mapping.transform.to_megatron([hf[name] for name in mapping.hf_names]) for mapping in table}


def check_megatron_weights(
    megatron: Mapping[str, HasShape],
    model: ModelConfig,
    *,
    naming: Naming,
    components: Iterable[Component] = COMPONENTS,
) -> tuple[WeightMapping, ...]:
    """Check Megatron tensors against the weight map; return the mappings of `components`. Other tensors are ignored.

    Raises ConversionError naming missing and wrongly shaped tensors.
    """
    table = tuple(weight_mappings(model, naming=naming, components=components))
    _check(megatron, {mapping.name: mapping.shape for mapping in table}, extra=(), where="the checkpoint's weights")
    return table


def to_hf(
    megatron: Mapping[str, torch.Tensor],
    model: ModelConfig,
    *,
    naming: Naming,
    components: Iterable[Component] = COMPONENTS,
) -> dict[str, torch.Tensor]:
    """Inverse of `to_megatron`, without what `drops` leaves out.

    Other components of `megatron` may be there and are not looked at.

    Raises ConversionError that names missing and wrongly shaped tensors. Results may be views of `megatron`.
    """
    table = check_megatron_weights(megatron, model, naming=naming, components=components)
    return {
        name: part
        for mapping in table
        for name, part in zip(mapping.hf_names, mapping.transform.to_hf(megatron[mapping.name]), strict=True)
    }


def _check(
    tensors: Mapping[str, HasShape], expected: Mapping[str, tuple[int, ...]], *, extra: Iterable[str], where: str
) -> None:
    problems = [f"missing: {name}, of shape {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected: {name}, of shape {tuple(tensors[name].shape)}" for name in extra]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            problems.append(
                f"wrong shape: {name} is {tuple(tensors[name].shape)}; the model configuration asks for {shape}"
            )
    if problems:
        more = [f"... and {len(problems) - _PROBLEMS_SHOWN} more"] if len(problems) > _PROBLEMS_SHOWN else []
        heading = f"these tensors are not those of {where}; compare the model configuration with their origin:"
        raise ConversionError("\n".join([heading, *problems[:_PROBLEMS_SHOWN], *more]))

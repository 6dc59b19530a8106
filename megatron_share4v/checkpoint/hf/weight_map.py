"""The weight map: which Hugging Face tensors make which global Megatron tensor, and which are ignored.

Import, export and verification use it; it knows no files, ranks or checkpoints. Megatron names and shapes are those of
`model.initialize.shards`: global, whatever the parallel layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from megatron_share4v.checkpoint.hf.transforms import ConcatRows, Identity, InterleaveQKV, PadVocabulary, Transform
from megatron_share4v.config.model import ModelConfig
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
    """Prefix of `embeddings.`, `pre_layrnorm.` and `encoder.`"""
    projector_mlp: tuple[str, str] | None = None
    """Prefixes of the two linear layers of mlp2x_gelu."""
    projector_linear: str | None = None
    decoder: str | None = None
    """Prefix of `embed_tokens.`, `layers.` and `norm.`"""
    head: str | None = None


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
    projector_mlp=("model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    decoder="model.language_model.",
    head="lm_head.",
)
"""`state_dict()` of the same class in transformers 5."""

SHARE4V = Naming(
    title="share4v",
    tower="model.vision_tower.vision_tower.vision_model.",
    projector_mlp=("model.mm_projector.0.", "model.mm_projector.2."),
    projector_linear="model.mm_projector.",
    decoder="model.",
    head="lm_head.",
)
"""Official ShareGPT4V and LLaVA; also a bare LlamaForCausalLM, with components=("language",)."""

CLIP = Naming(title="CLIPVisionModel", tower="vision_model.")
"""A vision tower beside its language model, as ShareGPT4V publishes it."""

CLIP_IN_MEMORY = Naming(title="transformers 5 CLIPVisionModel", tower="")


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


def _vision_rows(model: ModelConfig, prefix: str) -> Iterator[WeightMapping]:
    vision, same = model.vision, Identity()
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    heads = InterleaveQKV(
        groups=vision.num_attention_heads, queries_per_group=1, head_dim=width // vision.num_attention_heads
    )
    yield WeightMapping("vision.class_embedding", (width,), (f"{prefix}embeddings.class_embedding",), same)
    yield WeightMapping(
        "vision.patch_embedding.weight", (width, 3, patch, patch), (f"{prefix}embeddings.patch_embedding.weight",), same
    )
    yield WeightMapping(
        "vision.position_embedding",
        (vision.num_patches + 1, width),
        (f"{prefix}embeddings.position_embedding.weight",),
        same,
    )
    # `pre_layrnorm` is CLIP's spelling.
    yield from _with_bias("vision.pre_layernorm", width, [f"{prefix}pre_layrnorm"], same, inputs=())
    for i in range(vision.num_built_layers):
        megatron, hf = f"vision.layers.{i}", f"{prefix}encoder.layers.{i}"
        qkv = [f"{hf}.self_attn.{part}_proj" for part in "qkv"]
        yield from _with_bias(f"{megatron}.input_layernorm", width, [f"{hf}.layer_norm1"], same, inputs=())
        yield from _with_bias(f"{megatron}.self_attention.linear_qkv", 3 * width, qkv, heads, inputs=(width,))
        yield from _with_bias(
            f"{megatron}.self_attention.linear_proj", width, [f"{hf}.self_attn.out_proj"], same, inputs=(width,)
        )
        yield from _with_bias(f"{megatron}.pre_mlp_layernorm", width, [f"{hf}.layer_norm2"], same, inputs=())
        yield from _with_bias(f"{megatron}.mlp.linear_fc1", inner, [f"{hf}.mlp.fc1"], same, inputs=(width,))
        yield from _with_bias(f"{megatron}.mlp.linear_fc2", width, [f"{hf}.mlp.fc2"], same, inputs=(inner,))


def _projector_rows(model: ModelConfig, naming: Naming) -> Iterator[WeightMapping]:
    source, width, same = model.vision.hidden_size, model.language.hidden_size, Identity()
    kind = model.projector.type
    if kind == "mlp2x_gelu" and naming.projector_mlp is not None:
        first, second = (prefix.removesuffix(".") for prefix in naming.projector_mlp)
        yield from _with_bias("projector.mlp.linear_fc1", width, [first], same, inputs=(source,))
        yield from _with_bias("projector.mlp.linear_fc2", width, [second], same, inputs=(width,))
    elif kind == "linear" and naming.projector_linear is not None:
        yield from _with_bias(
            "projector.linear", width, [naming.projector_linear.removesuffix(".")], same, inputs=(source,)
        )
    else:
        raise ConversionError(
            f"the layout {naming.title} has no projector of model.projector.type {kind}; use another layout"
        )


def _language_rows(model: ModelConfig, naming: Naming) -> Iterator[WeightMapping]:
    language, same = model.language, Identity()
    width, inner, groups = language.hidden_size, language.intermediate_size, language.num_key_value_heads
    heads = InterleaveQKV(
        groups=groups,
        queries_per_group=language.num_attention_heads // groups,
        head_dim=width // language.num_attention_heads,
    )
    vocabulary = PadVocabulary(rows=language.vocab_size, padded=language.padded_vocab_size)
    qkv_rows = groups * (heads.queries_per_group + 2) * heads.head_dim
    yield WeightMapping(
        "language.embedding.weight", (vocabulary.padded, width), (f"{naming.decoder}embed_tokens.weight",), vocabulary
    )
    for i in range(language.num_layers):
        megatron, hf = f"language.decoder.layers.{i}", f"{naming.decoder}layers.{i}"
        qkv = tuple(f"{hf}.self_attn.{part}_proj.weight" for part in "qkv")
        gate_up = tuple(f"{hf}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        yield WeightMapping(f"{megatron}.input_layernorm.weight", (width,), (f"{hf}.input_layernorm.weight",), same)
        yield WeightMapping(f"{megatron}.self_attention.linear_qkv.weight", (qkv_rows, width), qkv, heads)
        yield WeightMapping(
            f"{megatron}.self_attention.linear_proj.weight", (width, width), (f"{hf}.self_attn.o_proj.weight",), same
        )
        yield WeightMapping(
            f"{megatron}.pre_mlp_layernorm.weight", (width,), (f"{hf}.post_attention_layernorm.weight",), same
        )
        yield WeightMapping(f"{megatron}.mlp.linear_fc1.weight", (2 * inner, width), gate_up, ConcatRows())
        yield WeightMapping(f"{megatron}.mlp.linear_fc2.weight", (width, inner), (f"{hf}.mlp.down_proj.weight",), same)
    yield WeightMapping("language.decoder.final_layernorm.weight", (width,), (f"{naming.decoder}norm.weight",), same)
    yield WeightMapping("language.head.weight", (vocabulary.padded, width), (f"{naming.head}weight",), vocabulary)


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
            yield from _vision_rows(model, naming.tower)
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
            yield IgnoredWeights(
                f"{naming.tower}post_layernorm.",
                "",
                "affects only the pooled class token, which is not used",
                weights=True,
            )
            yield IgnoredWeights(f"{naming.tower}embeddings.", "position_ids", "a buffer that counts up from zero")
            for i in range(model.vision.num_built_layers, model.vision.num_layers):
                reason = "comes after model.vision.feature_layer, so it is never computed"
                yield IgnoredWeights(f"{naming.tower}encoder.layers.{i}.", "", reason, weights=True)
        if component == "language" and naming.decoder is not None:
            yield IgnoredWeights(
                f"{naming.decoder}layers.",
                "rotary_emb.inv_freq",
                "a buffer that follows from model.language.rope_theta",
            )


def unused_tower_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tower weights that the model does not compute but an export has, by CLIP names without
    prefix.
    """
    tower = replace(model, vision=replace(model.vision, feature_layer=model.vision.num_layers))
    built = {name for mapping in _vision_rows(model, "") for name in mapping.hf_names}
    unused = {
        name: shape
        for mapping in _vision_rows(tower, "")
        for name, shape in mapping.hf_shapes().items()
        if name not in built
    }
    width = (model.vision.hidden_size,)
    return {**unused, "post_layernorm.weight": width, "post_layernorm.bias": width}


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

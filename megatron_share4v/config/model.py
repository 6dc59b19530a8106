"""The model section: vision tower, projector, language model, and which parts train.

Fields follow Hugging Face's names. Sizes are per model, never per rank. A family (CLIP, SigLIP, DINOv2; LLaMA, Qwen2,
Qwen3, Mistral) is a set of values of these fields; `model_type` names it for conversion, and no computation depends on
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from megatron_share4v.config.base import Bool, Conflict, Fraction, Int, PositiveFloat, PositiveInt, config
from megatron_share4v.config.presets import PRESET


@config
class VisionConfig:
    """Vision tower (ViT). Defaults: openai/clip-vit-large-patch14-336."""

    model_type: Literal["clip_vision_model", "siglip_vision_model", "dinov2"] = "clip_vision_model"
    """Hugging Face's name of the family, for import and export."""
    image_size: PositiveInt = 336
    """Side of the square input, in pixels."""
    patch_size: PositiveInt = 14
    """Side of a patch, in pixels."""
    hidden_size: PositiveInt = 1024
    intermediate_size: PositiveInt = 4096
    num_layers: PositiveInt = 24
    """Blocks of the published tower; those after `feature_layer` are never built."""
    num_attention_heads: PositiveInt = 16
    layer_norm_eps: PositiveFloat = 1e-5
    feature_layer: Int | tuple[Int, ...] = -2
    """Index into the list of hidden states (entry 0 is the input of the first block).

    Several indices: the features of all of them, concatenated on width in this order.
    """
    feature_select: Literal["default", "full"] = "default"
    """`default` leaves out the class token; `full` keeps all positions, the only choice without a class token."""
    class_token: Bool = True
    """Whether a learned class token comes before the patches."""
    patch_bias: Bool = False
    """Whether the patch convolution has a bias."""
    pre_norm: Bool = True
    """Whether a LayerNorm comes before the first block (CLIP)."""
    layer_scale: Bool = False
    """Whether the output of attention and of the MLP is multiplied by a learned vector (DINOv2)."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    """`gelu` is the exact (erf) form, `gelu_tanh` its tanh approximation."""
    image_mean: tuple[Fraction, Fraction, Fraction] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each RGB channel, of values in 0 to 1. An image is padded with this colour."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each RGB channel."""
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Filter with which images are resized."""
    resize: Literal["shortest_edge", "square"] = "shortest_edge"
    """`shortest_edge` keeps the aspect ratio, then crops the centre; `square` resizes both sides to image_size."""
    resize_edge: PositiveInt | None = None
    """Length of the shortest edge before the crop, in pixels; null: image_size."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find sizes that do not fit together, and a feature layer that does not exist."""
        yield from _indivisible(self, "hidden_size", "num_attention_heads")
        if self.patch_size > self.image_size:
            message = f"patch_size {self.patch_size} is larger than image_size {self.image_size}"
            yield Conflict(message, ("patch_size", "image_size"))
        if not self.feature_layers:
            yield Conflict("feature_layer is empty; name at least one layer", ("feature_layer",))
        for layer, number in zip(self._named_layers, self.feature_layers):
            if not 0 <= number <= self.num_layers:
                message = f"feature_layer {layer} does not exist in a tower of num_layers {self.num_layers}"
                yield Conflict(message, ("feature_layer", "num_layers"))
        if not self.class_token and self.feature_select == "default":
            message = "feature_select default leaves out the class token, and class_token is false; set it to full"
            yield Conflict(message, ("feature_select", "class_token"))
        if self.resize_edge is not None and (self.resize == "square" or self.resize_edge < self.image_size):
            message = (
                f"resize_edge {self.resize_edge} is for resize shortest_edge, and at least image_size "
                f"{self.image_size}; leave it out"
            )
            yield Conflict(message, ("resize_edge", "resize", "image_size"))

    @property
    def num_patches(self) -> int:
        """Number of patches of one image. Pixels right of and below the last whole patch are not seen."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Number of positions in the tower: the patches and the class token."""
        return self.num_patches + self.class_token

    @property
    def num_features(self) -> int:
        """Number of features of one image, each of which takes one language-model position."""
        return self.num_patches + (self.class_token and self.feature_select == "full")

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Indices of the selected hidden states, counted from the start."""
        return tuple(layer if layer >= 0 else self.num_layers + 1 + layer for layer in self._named_layers)

    @property
    def feature_width(self) -> int:
        """Width of a feature, the projector's input."""
        return self.hidden_size * len(self._named_layers)

    @property
    def num_built_layers(self) -> int:
        """Number of blocks up to the last selected layer."""
        return max(self.feature_layers)

    @property
    def _named_layers(self) -> tuple[int, ...]:
        return self.feature_layer if isinstance(self.feature_layer, tuple) else (self.feature_layer,)


@config
class ProjectorConfig:
    """Projector from tower features to language-model embeddings."""

    type: Annotated[str, Field(pattern=r"^(linear|mlp[1-9]x_gelu)$")] = "mlp2x_gelu"
    """`linear`, or `mlpNx_gelu`: N linear layers with erf GELU between them (LLaVA's names)."""

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        return 1 if self.type == "linear" else int(self.type[len("mlp")])


@config
class RopeScalingConfig:
    """Scaling of the rotary frequencies, with the values of Hugging Face's `rope_scaling`."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    """`linear` divides all frequencies by `factor`; `llama3` leaves the high ones and blends in between (Llama 3.1)."""
    factor: PositiveFloat = 1.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192

    def conflicts(self) -> Iterator[Conflict]:
        """Find values that the rope_type does not use, and bounds in the wrong order."""
        if self.rope_type == "default" and self.factor != 1.0:
            yield Conflict(
                f"factor {self.factor} has no effect with rope_type default; name the type, or leave it out",
                ("factor", "rope_type"),
            )
        if self.low_freq_factor >= self.high_freq_factor:
            yield Conflict(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}",
                ("low_freq_factor", "high_freq_factor"),
            )


@config
class LanguageConfig:
    """Decoder-only language model. Defaults: Vicuna-7B v1.5."""

    model_type: Literal["llama", "qwen2", "qwen3", "mistral"] = "llama"
    """Hugging Face's name of the family, for import and export."""
    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 4096
    intermediate_size: PositiveInt = 11008
    num_layers: PositiveInt = 32
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt = 32
    head_dim: PositiveInt | None = None
    """Width of a head; null: hidden_size / num_attention_heads."""
    qkv_bias: Bool = False
    """Whether queries, keys and values have biases (Qwen2)."""
    out_bias: Bool = False
    """Whether attention's output projection has a bias (LLaMA's `attention_bias` sets both)."""
    qk_norm: Bool = False
    """Whether each head's queries and keys pass an RMSNorm before the rotation (Qwen3)."""
    tie_word_embeddings: Bool = False
    """Whether the head is the embedding's matrix."""
    max_position_embeddings: PositiveInt = 4096
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    rms_norm_eps: PositiveFloat = 1e-5
    vocab_multiple: PositiveInt = 64
    """Embedding and head rows are padded to this multiple; independent of the layout, so checkpoints reshard."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find sizes that do not divide."""
        yield from _indivisible(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            yield from _indivisible(self, "hidden_size", "num_attention_heads")
        elif self.attention_head_dim % 2:
            message = f"heads of width {self.attention_head_dim} cannot be rotated in pairs; use an even head_dim"
            yield Conflict(message, ("head_dim", "hidden_size", "num_attention_heads"))

    @property
    def attention_head_dim(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads, which is also that of attention's result."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def key_width(self) -> int:
        """Width of the keys of all key/value heads, which is also that of the values."""
        return self.num_key_value_heads * self.attention_head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding and of the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@config
class TrainableConfig:
    """Which parts train; frozen parts have no gradients and no optimizer state."""

    language: Bool = True
    projector: Bool = True
    vision_from_block: Int | None = None
    """null: the tower is frozen. -1: all of it trains. N >= 0: blocks N and later train; embeddings and pre-LayerNorm
    stay frozen."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find an invalid block number, and a model without trained parts."""
        block = self.vision_from_block
        if block is not None and block < -1:
            yield Conflict(
                f"vision_from_block {block}: use a block number, -1 for the whole tower, or null to freeze it",
                ("vision_from_block",),
            )
        if not (self.language or self.projector or block is not None):
            yield Conflict(
                "nothing trains: switch on language, projector or vision_from_block",
                ("language", "projector", "vision_from_block"),
            )


@config
class ModelConfig:
    """Tower, projector, language model, and what of them trains.

    The first three may be written as the name of a preset: `language: qwen2.5_7b` (config/presets.py).
    """

    vision: Annotated[VisionConfig, PRESET] = field(default_factory=VisionConfig)
    projector: Annotated[ProjectorConfig, PRESET] = field(default_factory=ProjectorConfig)
    language: Annotated[LanguageConfig, PRESET] = field(default_factory=LanguageConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    init_std: PositiveFloat = 0.02
    """Standard deviation of freshly initialised matrices; init_std / sqrt(2 * layers) for output projections of
    the residual blocks."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find a first trained block beyond those that are built."""
        start, blocks = self.trainable.vision_from_block, self.vision.num_built_layers
        if start is not None and start >= blocks:
            message = (
                f"trainable.vision_from_block {start}: the tower has blocks 0..{blocks - 1} before its feature layer"
            )
            yield Conflict(message, ("trainable.vision_from_block", "vision.num_layers", "vision.feature_layer"))


def _indivisible(sizes: VisionConfig | LanguageConfig, whole: str, part: str) -> Iterator[Conflict]:
    if getattr(sizes, whole) % getattr(sizes, part):
        message = f"{whole} {getattr(sizes, whole)} is not a multiple of {part} {getattr(sizes, part)}"
        yield Conflict(message, (whole, part))

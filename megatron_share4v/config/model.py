"""The model section: CLIP ViT tower, projector, LLaMA language model, and which parts train.

Fields follow Hugging Face's names. Sizes are per model, never per rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Literal

from megatron_share4v.config.base import Bool, Conflict, Int, PositiveFloat, PositiveInt, config


@config
class VisionConfig:
    """CLIP ViT. Defaults: openai/clip-vit-large-patch14-336."""

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
    feature_layer: Int = -2
    """Index into the list of hidden states (entry 0 is the embedding after the pre-LayerNorm)."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find sizes that do not divide, and a feature layer that does not exist."""
        yield from _indivisible(self, "image_size", "patch_size")
        yield from _indivisible(self, "hidden_size", "num_attention_heads")
        if not 0 <= self.num_built_layers <= self.num_layers:
            message = f"feature_layer {self.feature_layer} does not exist in a tower of num_layers {self.num_layers}"
            yield Conflict(message, ("feature_layer", "num_layers"))

    @property
    def num_patches(self) -> int:
        """Number of language-model positions of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_built_layers(self) -> int:
        """Number of blocks up to `feature_layer`."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer


@config
class ProjectorConfig:
    """Projector from tower features to language-model embeddings."""

    type: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """`mlp2x_gelu` is Linear, erf GELU, Linear."""


@config
class LanguageConfig:
    """LLaMA decoder. Defaults: Vicuna-7B v1.5."""

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 4096
    intermediate_size: PositiveInt = 11008
    num_layers: PositiveInt = 32
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt = 32
    max_position_embeddings: PositiveInt = 4096
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    vocab_multiple: PositiveInt = 64
    """Embedding and head rows are padded to this multiple; independent of the layout, so checkpoints reshard."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find sizes that do not divide."""
        yield from _indivisible(self, "hidden_size", "num_attention_heads")
        yield from _indivisible(self, "num_attention_heads", "num_key_value_heads")

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
    """Tower, projector, language model, and what of them trains."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
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
        yield Conflict(
            f"{whole} {getattr(sizes, whole)} is not a multiple of {part} {getattr(sizes, part)}", (whole, part)
        )

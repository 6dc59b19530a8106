"""Run-dependent options of transformer layers: recomputation, FP8, Transformer Engine, attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_share4v.config.precision import PrecisionConfig, Recipe
from megatron_share4v.config.training import Recompute, TrainConfig
from megatron_share4v.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """Activation recomputation of one tower; the fields are those of TrainConfig."""

    granularity: Recompute = "none"
    modules: tuple[str, ...] = ()
    layers: int | None = None

    def config_kwargs(self) -> dict[str, Any]:
        """Return arguments of core's configuration.

        Core counts layers as `uniform` (all, one by one) or `block` (the first of each stage).
        """
        if self.granularity == "none":
            return {}
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        method = "uniform" if self.layers is None else "block"
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": self.layers or 1}

    def __str__(self) -> str:
        details = {
            "none": "",
            "full": f" ({self.layers} layers of each stage)" if self.layers else "",
            "selective": f" ({', '.join(self.modules)})",
        }
        return self.granularity + details[self.granularity]


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """Which matrix products are in FP8; the fields are those of PrecisionConfig."""

    recipe: Recipe = "none"
    first_layers: int = 0
    last_layers: int = 0
    tower: bool = False
    precise_weight_gradient: bool = False

    def covers(self, layer: int, *, layers: int) -> bool:
        """Whether decoder layer `layer` of `layers`, counted from 0, is in FP8."""
        return self.recipe != "none" and self.first_layers <= layer < layers - self.last_layers

    def te_config_kwargs(self) -> dict[str, Any]:
        """Return arguments of core's configuration for FP8 by Transformer Engine.

        Blockwise recipes have a scale per block and need no second format.
        """
        if self.recipe == "none":
            return {}
        return {
            "fp8": "e4m3" if self.recipe in ("blockwise", "mxfp8") else "hybrid",
            "fp8_recipe": self.recipe,
            "fp8_wgrad": not self.precise_weight_gradient,
            "first_last_layers_bf16": self.first_layers + self.last_layers > 0,
            "num_layers_at_start_in_bf16": self.first_layers,
            "num_layers_at_end_in_bf16": self.last_layers,
        }

    def __str__(self) -> str:
        left_out = (
            f", without the first {self.first_layers} and the last {self.last_layers} layers"
            if self.first_layers + self.last_layers
            else ""
        )
        return self.recipe + left_out + (", the tower too" if self.tower else "")


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Layer options of a run. Defaults are those of inference and conversion: no recomputation, no FP8."""

    language: Recomputation = Recomputation()
    tower: Recomputation = Recomputation()
    fp8: Fp8 = Fp8()
    transformer_engine: Literal["none", "language", "all"] = "none"
    """Which matrix products Transformer Engine computes."""
    attention: str = "sdpa"
    """Attention kernel of the language model."""
    variable_seq_lengths: bool = False
    """Whether sequence lengths vary between micro-batches, so that pipeline stages must exchange shapes."""

    @property
    def tower_attention(self) -> str:
        """Attention kernel of the vision tower, whose sequences are never packed."""
        return "sdpa" if self.attention in ("varlen", "te") else self.attention


def layer_options(
    train: TrainConfig,
    *,
    precision: PrecisionConfig = PrecisionConfig(),
    transformer_engine: Literal["none", "language", "all"] = "none",
    attention: str = "sdpa",
    variable_seq_lengths: bool = False,
    has_transformer_engine: bool = False,
) -> LayerOptions:
    """Return the layer options of a run. Raises ConfigError for what this machine does not support."""
    if (
        "selective" in (train.recompute, train.recompute_tower)
        and "layernorm" in train.recompute_modules
        and not has_transformer_engine
    ):
        raise ConfigError(
            "train.recompute_modules has layernorm, which megatron-core can recompute only where Transformer Engine is "
            "installed; leave it out, or use train.recompute full"
        )
    return LayerOptions(
        language=Recomputation(
            granularity=train.recompute, modules=train.recompute_modules, layers=train.recompute_layers
        ),
        tower=Recomputation(granularity=train.recompute_tower, modules=train.recompute_modules),
        fp8=Fp8(
            recipe=precision.fp8,
            first_layers=precision.fp8_first_layers,
            last_layers=precision.fp8_last_layers,
            tower=precision.fp8_tower,
            precise_weight_gradient=precision.fp8_weight_gradient == "dtype",
        ),
        transformer_engine=transformer_engine,
        attention=attention,
        variable_seq_lengths=variable_seq_lengths,
    )

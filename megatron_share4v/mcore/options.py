"""What a run chooses about its transformer layers beside their shape: computed how, and what of them is kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_share4v.config.run import Recompute, TrainConfig
from megatron_share4v.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """Of one tower; the fields are those of TrainConfig."""

    granularity: Recompute = "none"
    modules: tuple[str, ...] = ()
    layers: int | None = None

    def settings(self) -> dict[str, Any]:
        """For core's configuration. Core counts layers as `uniform` (all, one by one) or `block` (the first ones of each stage)."""
        if self.granularity == "none":
            return {}
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        method = "uniform" if self.layers is None else "block"
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": self.layers or 1}

    def __str__(self) -> str:
        details = {"none": "", "full": f" ({self.layers} layers of each stage)" if self.layers else "", "selective": f" ({', '.join(self.modules)})"}
        return self.granularity + details[self.granularity]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Defaults are those of inference and of conversion: plain layers that keep everything."""

    language: Recomputation = Recomputation()
    tower: Recomputation = Recomputation()
    attention: str = "sdpa"
    """Kernel of the language model's attention."""

    own_lengths: bool = False
    """Micro-batches have lengths of their own, which pipeline stages must tell each other."""

    @property
    def tower_attention(self) -> str:
        """The tower's: its sequences are never packed, so kernels for packs have nothing to give there."""
        return "sdpa" if self.attention in ("varlen", "te") else self.attention


def layer_options(
    train: TrainConfig, *, attention: str = "sdpa", own_lengths: bool = False, has_transformer_engine: bool = False
) -> LayerOptions:
    """Of one run. Raises ConfigError for what this machine cannot do."""
    if "selective" in (train.recompute, train.recompute_tower) and "layernorm" in train.recompute_modules and not has_transformer_engine:
        raise ConfigError(
            "train.recompute_modules has layernorm, which megatron-core can recompute only where Transformer Engine is installed; leave it out, or "
            "use train.recompute full"
        )
    return LayerOptions(
        language=Recomputation(granularity=train.recompute, modules=train.recompute_modules, layers=train.recompute_layers),
        tower=Recomputation(granularity=train.recompute_tower, modules=train.recompute_modules),
        attention=attention,
        own_lengths=own_lengths,
    )

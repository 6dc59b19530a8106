"""Projector from tower features to language model embeddings: one linear layer, or LLaVA-1.5's mlp2x_gelu.

P: patches per image; N: images; V: tower width; H: language width.
"""

from __future__ import annotations

import torch

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.mcore.layer_specs import mlp_submodules
from megatron_share4v.mcore.layers import ColumnParallelLinear, MegatronModule
from megatron_share4v.mcore.mlp import ActivatedMLP


class Projector(MegatronModule):
    """[P, N, V] features -> [P, N, H] embeddings; sharded over the TP group, full result on every rank."""

    def __init__(self, config: LayerConfig, *, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__(config)
        width = model.vision.hidden_size
        if model.projector.type == "linear":
            self.linear = ColumnParallelLinear(
                width,
                model.language.hidden_size,
                config=config,
                init_method=config.init_method,
                gather_output=True,
                tp_group=mesh.tp_group,
            )
        else:
            self.mlp = ActivatedMLP(
                config,
                mlp_submodules(),
                input_size=width,
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=mesh.tp_group,
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project the features of every patch."""
        output, bias = self.linear(features) if hasattr(self, "linear") else self.mlp(features)
        return output if bias is None else output + bias

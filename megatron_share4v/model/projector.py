"""Projector from tower features to language model embeddings: linear layers with GELU between them.

F: features per image; N: images; V: width of a feature; H: language width.
"""

from __future__ import annotations

import torch

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.mcore.layer_specs import mlp_submodules
from megatron_share4v.mcore.layers import ColumnParallelLinear, LayerList, MegatronModule, RowParallelLinear
from megatron_share4v.mcore.mlp import ActivatedMLP


class Projector(MegatronModule):
    """[F, N, V] features -> [F, N, H] embeddings; sharded over the TP group, full result on every rank.

    One layer is `linear`, two are `mlp`, more are `layers`.
    """

    def __init__(self, config: LayerConfig, *, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__(config)
        width, depth = model.vision.feature_width, model.projector.depth
        if depth == 1:
            self.linear = _column(config, width, gather_output=True, mesh=mesh)
        elif depth == 2:
            self.mlp = ActivatedMLP(
                config,
                mlp_submodules(),
                input_size=width,
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=mesh.tp_group,
            )
        else:
            # Pairs of column- and row-parallel layers, as in an MLP; a last one without a partner is gathered.
            self.layers = LayerList(
                _row(config, mesh=mesh)
                if number % 2
                else _column(
                    config, config.hidden_size if number else width, gather_output=number == depth - 1, mesh=mesh
                )
                for number in range(depth)
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project the features of every patch."""
        if hasattr(self, "layers"):
            output, bias = self.layers[0](features)
            for layer in self.layers[1:]:
                output, bias = layer(self.config.activation(output, bias=bias))
        else:
            output, bias = self.linear(features) if hasattr(self, "linear") else self.mlp(features)
        return output if bias is None else output + bias


def _column(config: LayerConfig, inputs: int, *, gather_output: bool, mesh: Mesh) -> ColumnParallelLinear:
    """Build a column-parallel layer; it returns its bias for the activation unless it gathers its output."""
    return ColumnParallelLinear(
        inputs,
        config.hidden_size,
        config=config,
        init_method=config.init_method,
        gather_output=gather_output,
        skip_bias_add=not gather_output,
        tp_group=mesh.tp_group,
    )


def _row(config: LayerConfig, *, mesh: Mesh) -> RowParallelLinear:
    """Build a row-parallel layer, which returns its bias."""
    return RowParallelLinear(
        config.hidden_size,
        config.hidden_size,
        config=config,
        init_method=config.init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=True,
        tp_group=mesh.tp_group,
    )

"""Layer specs: which norm, linear layers and attention a transformer layer is made of. No Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_share4v.mcore.attention import CoreAttention
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.mlp import ActivatedMLP
from megatron_share4v.mcore.transformer import LayerConfig
from megatron_share4v.ops.norm import layer_norm, rms_norm


class NativeRMSNorm(torch.nn.RMSNorm):
    """torch's, computed by our kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., W] -> [..., W]."""
        return rms_norm(x, weight=self.weight, eps=self.eps, implementation="native")


class NativeLayerNorm(torch.nn.LayerNorm):
    """torch's, computed by our kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., W] -> [..., W]."""
        return layer_norm(x, weight=self.weight, bias=self.bias, eps=self.eps, implementation="native")


NORMS = {
    ("RMSNorm", "native"): NativeRMSNorm,
    ("LayerNorm", "native"): NativeLayerNorm,
    # torch has these norms fused already: faster than the reference formulas that the kernels are tested against.
    ("RMSNorm", "reference"): torch.nn.RMSNorm,
    ("LayerNorm", "reference"): torch.nn.LayerNorm,
}


class Norm:
    """RMSNorm or LayerNorm, by `config.normalization` and `config.ops`. Core's own wrapper refuses sequence parallelism."""

    def __new__(cls, config: LayerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        norm = NORMS[config.normalization, config.ops](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            # finalize_model_grads sums the gradients of tagged parameters over the tensor group.
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def mlp_submodules() -> MLPSubmodules:
    """Column-parallel in, row-parallel out."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def layer_spec(*, causal: bool, mesh: Mesh) -> ModuleSpec:
    """A pre-norm transformer layer. `causal=False` is for the vision tower (core's own ViT spec is causal, which CLIP is not)."""
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention = SelfAttentionSubmodules(linear_qkv=ColumnParallelLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=ActivatedMLP, submodules=mlp_submodules(), params={"tp_group": mesh.tensor_group}),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_submodules(num_layers: int, *, mesh: Mesh) -> TransformerBlockSubmodules:
    """The decoder layers of one stage and the final norm (built on the last stage alone)."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(causal=True, mesh=mesh)] * num_layers, layer_norm=Norm)

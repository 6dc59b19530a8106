"""Layer specs: the norm, linear layers and attention of a transformer layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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

from megatron_share4v.config.model import VisionConfig
from megatron_share4v.mcore.attention import CoreAttention
from megatron_share4v.mcore.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.mcore.layer_scale import ScaledMLP, ScaledSelfAttention
from megatron_share4v.mcore.mlp import ActivatedMLP
from megatron_share4v.ops.norm import layer_norm, rms_norm


class NativeRMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm with the fused kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., W] -> [..., W]."""
        assert self.eps is not None
        return rms_norm(x, weight=self.weight, eps=self.eps, implementation="native")


class NativeLayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm with the fused kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., W] -> [..., W]."""
        return layer_norm(x, weight=self.weight, bias=self.bias, eps=self.eps, implementation="native")


NORMS = {
    ("RMSNorm", "native"): NativeRMSNorm,
    ("LayerNorm", "native"): NativeLayerNorm,
    # torch's fused norms are faster than the reference formulas that the kernels are tested against.
    ("RMSNorm", "reference"): torch.nn.RMSNorm,
    ("LayerNorm", "reference"): torch.nn.LayerNorm,
}


class Norm:
    """RMSNorm or LayerNorm, by `config.normalization` and `config.ops`.

    Core's own wrapper does not support sequence parallelism.
    """

    def __new__(cls, config: LayerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Build the norm module; core's build_module needs a class."""
        norm = NORMS[config.normalization, config.ops](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            # finalize_model_grads sums the gradients of tagged parameters over the TP group.
            parameter.sequence_parallel = config.sequence_parallel
        return norm


@dataclass(frozen=True)
class LinearClasses:
    """Column-parallel and row-parallel linear classes of a layer. All have the same parameters under the same names."""

    column: type = ColumnParallelLinear
    row: type = RowParallelLinear


PLAIN = LinearClasses()
FP8 = LinearClasses(Fp8ColumnParallelLinear, Fp8RowParallelLinear)


def _linear_classes(*, fp8: bool, transformer_engine: bool) -> LinearClasses:
    """Select the linear classes. Transformer Engine uses one class for bf16 and FP8: core's configuration decides."""
    if transformer_engine:
        from megatron_share4v.mcore.layer_specs_te import COLUMN, ROW  # not importable without Transformer Engine

        return LinearClasses(COLUMN, ROW)
    return FP8 if fp8 else PLAIN


@cache
def _with_bias(linear: Any) -> type:
    """Return a subclass of `linear` that always has a bias, whatever core asks for."""

    def initialize(self: Any, *sizes: int, bias: bool, **options: Any) -> None:
        linear.__init__(self, *sizes, bias=True, **options)

    return type(f"{linear.__name__}WithBias", (linear,), {"__init__": initialize})


def mlp_submodules(linears: LinearClasses = PLAIN) -> MLPSubmodules:
    """Column-parallel fc1, row-parallel fc2."""
    return MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)


def layer_spec(
    *,
    causal: bool,
    mesh: Mesh,
    linears: LinearClasses = PLAIN,
    attention: type = CoreAttention,
    qk_norm: bool = False,
    out_bias: bool = False,
    layer_scale: bool = False,
) -> ModuleSpec:
    """Spec of a pre-norm transformer layer.

    `causal=False` is for the vision tower (core's ViT spec is causal, the towers are not). `qk_norm`: each head's
    queries and keys pass a norm before the rotation. `out_bias`: attention's output projection has a bias also where
    the MLP has none. `layer_scale`: learned vectors multiply the outputs of attention and MLP.
    """
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    self_attention, mlp = (ScaledSelfAttention, ScaledMLP) if layer_scale else (SelfAttention, ActivatedMLP)
    head_norm = Norm if qk_norm else None
    submodules = SelfAttentionSubmodules(
        linear_qkv=linears.column,
        core_attention=attention,
        linear_proj=_with_bias(linears.row) if out_bias else linears.row,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(module=self_attention, params={"attn_mask_type": mask}, submodules=submodules),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=mlp, submodules=mlp_submodules(linears), params={"tp_group": mesh.tp_group}),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_submodules(
    numbers: range, *, config: LayerConfig, mesh: Mesh, options: LayerOptions
) -> TransformerBlockSubmodules:
    """Specs of one stage's decoder layers `numbers` (counted from 0) of the model's, and the final norm.

    Core builds the final norm on the last stage only.
    """
    attention: type = CoreAttention
    if options.attention == "te":
        from megatron_share4v.mcore.layer_specs_te import TEAttention

        attention = TEAttention
    specs = [
        layer_spec(
            causal=True,
            mesh=mesh,
            linears=_linear_classes(
                fp8=options.fp8.covers(number, layers=config.num_layers),
                transformer_engine=options.transformer_engine != "none",
            ),
            attention=attention,
            qk_norm=config.qk_layernorm,
            out_bias=config.out_bias,
        )
        for number in numbers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)


def tower_spec(vision: VisionConfig, *, mesh: Mesh, options: LayerOptions) -> ModuleSpec:
    """Spec of a block of the vision tower."""
    return layer_spec(
        causal=False,
        mesh=mesh,
        linears=_linear_classes(fp8=options.fp8.tower, transformer_engine=options.transformer_engine == "all"),
        layer_scale=vision.layer_scale,
    )

"""megatron-core configurations of the tower, projector and language model layers.

Every value that core would otherwise guess is set here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.ops.activation import bias_gelu, bias_gelu_tanh, bias_quick_gelu, bias_swiglu
from megatron_share4v.ops.op import Implementation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TOWER_ACTIVATIONS = {"quick_gelu": bias_quick_gelu, "gelu": bias_gelu, "gelu_tanh": bias_gelu_tanh}
"""Activations by VisionConfig.activation."""

# Fusions that need Transformer Engine, apex or a CUDA kernel.
_UNFUSED = dict(
    gradient_accumulation_fusion=False,
    masked_softmax_fusion=False,
    persist_layer_norm=False,
    apply_rope_fusion=False,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
)


@dataclass
class LayerConfig(TransformerConfig):
    """Core's TransformerConfig with the fields that our layers add."""

    ops: Implementation = "reference"
    """Implementation of the fused ops; backends.py decides."""
    attention: str = "sdpa"
    """Attention kernel (attention.py); backends.py decides."""
    precise_weight_gradient: bool = False
    """Whether FP8 layers (fp8.py) compute weight gradients in the weight's dtype."""
    out_bias: bool = False
    """Whether attention's output projection has a bias; core ties it to the biases of the MLP."""
    activation: Callable[..., torch.Tensor] = partial(bias_gelu, implementation="reference")  # noqa: RUF009 (immutable)
    """Activation of an MLP, called as f(x, bias=bias of fc1) (mlp.py). Core's own `activation_func` is not used."""


def _base(
    *, dtype: torch.dtype, parallel: ParallelConfig, ops: Implementation, init_std: float, num_layers: int
) -> dict:
    return dict(
        ops=ops,
        tensor_model_parallel_size=parallel.tensor,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Weights are allocated on the CPU and filled by model/initialize.py or a checkpoint; core initializes nothing.
        use_cpu_initialization=True,
        perform_initialization=False,
        init_method_std=init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The loss is a sum and a count; core divides gradients by the global count of the step.
        calculate_per_token_loss=True,
        num_layers=num_layers,
        **_UNFUSED,
    )


def language_config(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    ops: Implementation,
    options: LayerOptions = LayerOptions(),
    layers_per_stage: Sequence[int],
) -> LayerConfig:
    """Decoder: RMSNorm, SwiGLU, rotary positions, grouped queries; biases and q/k norms as `model.language` says.

    `layers_per_stage` covers pipeline x virtual stages in order.
    """
    language = model.language
    stages = [["decoder"] * count for count in layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    interleaved = parallel.virtual > 1
    return LayerConfig(
        **_base(dtype=dtype, parallel=parallel, ops=ops, init_std=model.init_std, num_layers=language.num_layers),
        attention=options.attention,
        precise_weight_gradient=options.fp8.precise_weight_gradient,
        **(options.fp8.te_config_kwargs() if options.transformer_engine != "none" else {}),
        **options.language.config_kwargs(),
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if interleaved else None,
        pipeline_model_parallel_layout=stages if parallel.pipeline > 1 else None,
        # With two pipeline ranks, batched point-to-point calls of the interleaved schedule silently swap two messages.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # a host sync after each message, which only old versions of torch needed
        variable_seq_lengths=options.variable_seq_lengths and parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # core's default does not allow variable lengths, even without experts
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        tp_comm_overlap=parallel.overlap_tensor,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.intermediate_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_key_value_heads,
        kv_channels=language.attention_head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=language.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        out_bias=language.out_bias,
        # The norms themselves are in the layer spec; with this, core sums their gradients over the TP group.
        qk_layernorm=language.qk_norm,
        gated_linear_unit=True,
        activation=partial(bias_swiglu, implementation=ops),
    )


def vision_config(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    ops: Implementation,
    options: LayerOptions = LayerOptions(),
) -> LayerConfig:
    """ViT: pre-LayerNorm blocks with biases.

    On the first stage only, without sequence parallelism (its number of positions is odd or a square, rarely a multiple
    of the ranks); each CP rank has the images of its own positions.
    """
    vision = model.vision
    return LayerConfig(
        **_base(
            dtype=dtype, parallel=parallel, ops=ops, init_std=model.init_std, num_layers=max(1, vision.num_built_layers)
        ),
        attention=options.tower_attention,
        precise_weight_gradient=options.fp8.precise_weight_gradient,
        **options.tower.config_kwargs(),
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layer_norm_eps,
        add_bias_linear=True,
        gated_linear_unit=False,
        activation=partial(TOWER_ACTIVATIONS[vision.activation], implementation=ops),
    )


def projector_config(
    model: ModelConfig, *, parallel: ParallelConfig, dtype: torch.dtype, ops: Implementation
) -> LayerConfig:
    """Linear layers of the language model's width with erf GELU between them."""
    width = model.language.hidden_size
    return LayerConfig(
        **_base(dtype=dtype, parallel=parallel, ops=ops, init_std=model.init_std, num_layers=1),
        hidden_size=width,
        ffn_hidden_size=width,
        num_attention_heads=model.language.num_attention_heads,
        add_bias_linear=True,
        gated_linear_unit=False,
        activation=partial(bias_gelu, implementation=ops),
    )


def residual_init_std(model: ModelConfig, *, num_layers: int) -> float:
    """Standard deviation of matrices that write to the residual stream (GPT-2, section 2.3)."""
    return model.init_std / math.sqrt(2 * num_layers)

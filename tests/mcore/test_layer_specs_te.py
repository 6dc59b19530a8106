"""Arguments passed to Transformer Engine, checked with a fake of megatron-core's wrapper.

Tests/gpu runs the real one.
"""

from __future__ import annotations

import ast
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as wrapper
from megatron.core.transformer.enums import AttnMaskType

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore import layer_specs_te
from megatron_share4v.mcore.attention import AttentionMetadata, build_attention_metadata, math
from megatron_share4v.mcore.fp8 import Fp8ColumnParallelLinear
from megatron_share4v.mcore.layer_config import LayerConfig, language_config
from megatron_share4v.mcore.layer_options import Fp8, LayerOptions
from megatron_share4v.mcore.layer_specs import decoder_submodules, tower_spec
from megatron_share4v.mcore.layers import ColumnParallelLinear

SEGMENTS = ((5, 1, 3), (12,))


def wrapped_arguments(method: str) -> set[str]:
    """Argument names of the wrapper's method, read from its source: the class needs Transformer Engine."""
    tree = ast.parse(inspect.getsource(wrapper))
    [cls] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"]
    [function] = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == method]
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


class StandIn(torch.nn.Module):
    """Fake attention: [S, B, heads, width], or [T, heads, width] with cu_seqlens."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()
        assert set(named) <= wrapped_arguments("__init__"), named

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, kind: AttnMaskType, **named: Any
    ) -> torch.Tensor:
        assert (
            mask is None
            and set(named) <= wrapped_arguments("forward")
            and all(x.is_contiguous() or not named for x in (query, key, value))
        )
        causal = kind is AttnMaskType.causal
        if not named:
            return math(query, key, value, metadata=AttentionMetadata(), causal=causal, scale=None)
        packs = named["packed_seq_params"]
        assert (
            packs.qkv_format == "thd"
            and query.dim() == 3
            and packs.cu_seqlens_q is packs.cu_seqlens_kv
            and packs.cu_seqlens_q.dtype is torch.int32
        )
        lengths = packs.cu_seqlens_q.diff().tolist()
        assert packs.max_seqlen_q == packs.max_seqlen_kv == max(lengths)
        together = math(
            *(x.unsqueeze(1) for x in (query, key, value)),
            metadata=AttentionMetadata(sample_lengths=(tuple(lengths),)),
            causal=causal,
            scale=None,
        )
        return together[:, 0]


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_transformer_engine_gets_thd_packs(segments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_specs_te, "TEDotProductAttention", StandIn)
    config = LayerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, attention="te"
    )
    attention = layer_specs_te.TEAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=None, cp_comm_type=None, pg_collection=None
    )
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, 2, heads, 4, generator=generator) for heads in (4, 2, 2))
    metadata = build_attention_metadata(torch.zeros(12, 2), segments=segments, kernel="te")
    metadata.rope_cache = None
    got = attention(query, key, value, packed_seq_params=metadata)
    assert got.is_contiguous()
    torch.testing.assert_close(
        got, math(query, key, value, metadata=metadata, causal=True, scale=None), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("groups", "tensor", "context", "expected"), [(8, 2, 2, (4, 4)), (2, 2, 4, (2, 2)), (8, 1, 1, (8, 8))]
)
def test_transformer_engine_gets_the_heads_of_one_rank(
    groups: int, tensor: int, context: int, expected: tuple[int, int]
) -> None:
    """Ulysses is implemented in mcore/ulysses.py: Transformer Engine's context parallelism must not start beside it."""
    config = LayerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=8, num_query_groups=groups, tensor_model_parallel_size=tensor,
        context_parallel_size=context, attention_dropout=0.0, attention="te",
    )  # fmt: skip
    alone = layer_specs_te._without_context_parallel(config)
    assert (alone.num_attention_heads, alone.num_query_groups, alone.context_parallel_size) == (*expected, 1)
    assert (config.num_attention_heads, config.context_parallel_size) == (8, context)


def decoder_config(*, layers: int) -> LayerConfig:
    model = ModelConfig(language=LanguageConfig(num_layers=layers))
    return language_config(
        model, parallel=ParallelConfig(), dtype=torch.bfloat16, ops="reference", layers_per_stage=(layers,)
    )


def columns(options: LayerOptions) -> list[type]:
    mesh = SimpleNamespace(tp_group=None)
    layers = decoder_submodules(range(2, 6), config=decoder_config(layers=6), mesh=mesh, options=options).layer_specs
    return [
        layer.submodules.mlp.submodules.linear_fc1
        for layer in (*layers, tower_spec(VisionConfig(), mesh=mesh, options=options))
    ]


def test_layers_use_the_selected_linear_classes() -> None:
    plain, own, engine = ColumnParallelLinear, Fp8ColumnParallelLinear, layer_specs_te.COLUMN
    assert columns(LayerOptions()) == [plain] * 5
    fp8 = Fp8(recipe="tensorwise", first_layers=3, last_layers=1)
    assert columns(LayerOptions(fp8=fp8)) == [plain, own, own, plain, plain]
    assert columns(LayerOptions(fp8=Fp8(recipe="tensorwise", tower=True))) == [own] * 5
    assert columns(LayerOptions(fp8=fp8, transformer_engine="language")) == [engine] * 4 + [plain]
    assert columns(LayerOptions(transformer_engine="all")) == [engine] * 5
    mesh, options = SimpleNamespace(tp_group=None), LayerOptions(attention="te")
    te = decoder_submodules(range(1), config=decoder_config(layers=1), mesh=mesh, options=options).layer_specs[0]
    assert te.submodules.self_attention.submodules.core_attention is layer_specs_te.TEAttention


@pytest.mark.parametrize(
    ("recipe", "format"), [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")]
)
def test_recipes_reach_core(recipe: Any, format: str) -> None:
    first = 0 if recipe == "delayed" else 1
    options = LayerOptions(fp8=Fp8(recipe=recipe, first_layers=first), transformer_engine="language")
    config = language_config(
        ModelConfig(),
        parallel=ParallelConfig(),
        dtype=torch.bfloat16,
        ops="reference",
        options=options,
        layers_per_stage=(32,),
    )
    assert (config.fp8, config.fp8_recipe, config.fp8_wgrad) == (format, recipe, True)
    assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16) == (bool(first), first)
